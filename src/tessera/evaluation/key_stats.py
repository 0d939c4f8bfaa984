"""The statistics of a model's keys, and of the queries that read them, on a text."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tessera.adapters import attached_memory
from tessera.attention import enable
from tessera.attention.observed import Call, observed
from tessera.cache.model_config import read_config, rotary_partner
from tessera.codecs.channel_stats import KeyStats
from tessera.evaluation.loading import Source, encode, windows

#: First tokens whose keys are left out: those of attention sinks differ from other keys, and stay exact in most caches.
SKIPPED = 4
#: Default number of tokens that are read.
TOKENS = 2048


@torch.inference_mode()
def measure_stats(
    source: Source, text: str, tokens: int = TOKENS, progress: Callable[[int, int], None] | None = None
) -> list[KeyStats]:
    """Let a model read a text, and measure the statistics for `tessera.Cache(..., stats=...)`.

    Args:
        source: the model and its tokenizer; its attention is routed through Tessera.
        text: a text of the kind that the model is to read later, though another serves nearly as well.
        tokens: to be read, fewer if the text or the model's context is shorter.
        progress: called with the layers that are done and those there are.

    Returns:
        for each layer the statistics of one row.

    Raises:
        ValueError: for fewer than 64 tokens, or a model that has a memory attached or calls its attention in parts.
    """
    if tokens < 64:
        raise ValueError(f"statistics need 64 tokens or more, got {tokens}")
    model = source.model
    if attached_memory(model) is not None:
        raise ValueError("statistics are measured on the model as it is, without an attached memory: tessera.detach(model)")
    text_config, layers = read_config(model.config)
    ids = encode(source.tokenizer, text)
    ids = windows(ids, min(tokens, source.context or tokens, len(ids)), 1, None).to(model.device)
    if ids.shape[1] < 64:
        raise ValueError(f"the text has {ids.shape[1]} tokens; statistics need 64 or more")
    found: dict[int, KeyStats] = {}

    def see(call: Call) -> None:
        if call.key.shape[:3:2] != call.query.shape[:3:2]:
            raise ValueError("this model calls its attention in parts, so its keys cannot be measured")
        heads, dim = layers[call.layer][0]
        squares = call.query.float().square().unflatten(1, (heads, -1)).mean(2)
        found[call.layer] = KeyStats.measure(squares, call.key[:, :, SKIPPED:], rotary_partner(text_config, dim))
        if progress is not None:
            progress(len(found), len(layers))

    enable(model)
    with observed(see):
        model(input_ids=ids, use_cache=False)
    if sorted(found) != list(range(len(layers))):
        raise ValueError(f"only {len(found)} of {len(layers)} layers called an attention function")
    return [found[layer] for layer in range(len(layers))]
