"""Language beyond the window: a model's loss by position in the sequence, with and without a Tensor Cache behind its window.

Controls: the memory's reads switched off, and a window that is longer by as many tokens as the matrix takes bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

from tessera.adapters import attached_memory, reading, tensor_cache
from tessera.cache import Cache
from tessera.evaluation.loading import Source, encode, windows
from tessera.evaluation.records import environment

TOGETHER = 16
"""Number of sequences read at once."""

WITH_MEMORY = "with the Tensor Cache"
"""Name of the row that depends on a trained memory."""


@torch.no_grad()
def loss_by_distance(model: Any, windows: Tensor, spec: str | None, edges: Sequence[int], chunk: int = 256) -> list[float]:
    """Measure the mean negative log-likelihood by position in the sequence.

    Args:
        model: a causal language model.
        windows: (count, tokens) ids, each read from the beginning.
        spec: specification of the cache that it reads through; None: none.
        edges: ascending positions; the result has one number for each range between neighbours.
        chunk: tokens of a call.
    """
    cache = None if spec is None else Cache(spec, model)
    losses = []
    previous: Tensor | None = None
    for part in windows.split(windows.shape[1] if cache is None else chunk, dim=1):
        output = model(input_ids=part) if cache is None else model(input_ids=part, past_key_values=cache)
        logits = output.logits.float()
        if previous is not None:
            losses.append(cross_entropy(previous, part[:, 0], reduction="none")[:, None])
        losses.append(cross_entropy(logits[:, :-1].transpose(1, 2), part[:, 1:], reduction="none"))
        previous = logits[:, -1]
    every = torch.cat(losses, dim=1)  # losses of tokens 1 and later
    return [float(every[:, max(0, a - 1) : b - 1].mean()) for a, b in itertools.pairwise(edges)]


def over_stretches(losses: Sequence[float], edges: Sequence[int]) -> dict[str, Any]:
    """``losses`` by stretch, and their means over ``all``, ``beyond`` the first stretch, which is the window's, and ``far``:
    beyond the third, four windows."""
    sizes = [b - a for a, b in itertools.pairwise(edges)]

    def over(first: int) -> float:
        return sum(x * n for x, n in zip(losses[first:], sizes[first:], strict=True)) / sum(sizes[first:])

    return {"losses": list(losses), "all": over(0), "beyond": over(1), "far": over(3)}


def language(
    source: Source,
    text: str,
    *,
    tokens: int = 2048,
    count: int | None = 16,
    names: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure a model that has a memory attached against itself without.

    Args:
        source: the model and its tokenizer.
        text: to be predicted.
        tokens: length of a sequence, at most the model's context.
        count: sequences to read, fewer if the text is shorter; None: all of it.
        names: names of the rows to measure; None: all.
        progress: called with (caches measured, caches in all).

    Returns:
        a record for JSON: ``environment``, ``edges`` of the stretches, ``windows`` and ``rows`` of name, spec and losses.

    Raises:
        ValueError: if nothing is attached, or the sequences are too short to measure beyond the window.
    """
    model = source.model
    if attached_memory(model) is None:
        raise ValueError("the model has no memory; give a file of tessera.save_memory, or attach one")
    config = tensor_cache(model).config
    window, sink, dim = config.window, config.sink, model.config.get_text_config(decoder=True).head_dim
    if source.context is not None and tokens > source.context:
        raise ValueError(f"sequences of {tokens} tokens are longer than the {source.context} that the model was made for")
    ids = windows(encode(source.tokenizer, text), tokens, count, source.tokenizer.bos_token_id).to(model.device)
    if ids.shape[1] <= 4 * window:
        raise ValueError(f"sequences need more than four windows of {window} tokens; there are {ids.shape[1]}")
    edges = (1, window, 2 * window, 4 * window, ids.shape[1])
    # A float32 matrix of d x d is as large as d / 2 float32 pairs of a key and a value.
    specs = {
        "dense": "dense",
        "window": f"window:{window}",
        "window + sinks": f"sink:{sink} + window:{window}",
        "the same, longer by the memory's bytes": f"sink:{sink} + window:{window + dim // 2}",
        WITH_MEMORY: f"sink:{sink} + window:{window} + tc",
        "its reads switched off": f"sink:{sink} + window:{window} + tc",
    }
    specs = {name: spec for name, spec in specs.items() if names is None or name in names}
    rows: list[dict[str, Any]] = []
    try:
        for number, (name, spec) in enumerate(specs.items()):
            if progress is not None:
                progress(number, len(specs))
            reading(model, "off" not in name)
            parts = [[loss * len(part) for loss in loss_by_distance(model, part, spec, edges)] for part in ids.split(TOGETHER)]
            losses = [sum(values) / len(ids) for values in zip(*parts, strict=True)]
            rows.append({"name": name, "spec": spec, **over_stretches(losses, edges)})
    finally:
        reading(model, True)
    return {"environment": environment(), "edges": edges, "windows": len(ids), "rows": rows}


def language_table(record: dict[str, Any]) -> Table:
    """Losses by stretch."""
    stretches = (f"tokens {a:,}–{b:,}" for a, b in itertools.pairwise(record["edges"]))
    table = Table("attention", *stretches, "all", "beyond the window")
    for row in record["rows"]:
        table.add_row(row["name"], *(f"{loss:.4f}" for loss in (*row["losses"], row["all"], row["beyond"])))
    return table
