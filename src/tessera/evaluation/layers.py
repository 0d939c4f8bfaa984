"""A cache's effect on attention, layer by layer: the divergence of the attention weights, and the error of the output.

One window of the text is read by the exact model. Every layer's queries, keys and values, as its attention function is given
them (after the rotary embedding), go through that layer of a new cache of each specification and Tessera's own attention, cut
into calls as the protocol cuts them. So each layer gets the exact model's numbers, and errors do not add up from layer to
layer: this measures which layers suffer, not the final loss.

Two quantities, with p the exact weights of a query over all keys that it sees:

- KL(p || q) in nats, where q are the weights over the keys as they are decoded from the cache, or exact where it has them so;
  the mean over heads and queries. Values have no effect on it. It is None where the cache drops keys that a query sees, as a
  window does: q is zero there, and the divergence infinite.
- the relative error of attention's output, before the output projection: the root of the sum of squares of its difference from
  the exact output, over heads, queries and head_dim, relative to that of the exact output. It is measured with the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tessera.adapters import attached_memory
from tessera.attention import attention_forward, enable
from tessera.attention.observed import Call, observed
from tessera.cache.model_config import read_config
from tessera.cache_layers.cache_layer import TesseraLayer
from tessera.codecs.channel_stats import KeyStats
from tessera.evaluation.protocols import filler, new_cache
from tessera.evaluation.records import LayerRow
from tessera.kernels import CompressedKV
from tessera.tiers.per_layer import parse
from tessera.tiers.policy import RetentionPolicy

#: Number of queries whose weights are computed at once.
QUERIES = 128


@dataclass
class _Sums:
    """Sums over the queries of one layer.

    Attributes:
        kl: sum over heads and queries, in nats.
        rows: heads times queries.
        dropped: a query sees keys that the cache no longer has.
        error: sum of squares of the difference of what attention gives.
        size: sum of squares of what it gives exactly.
    """

    kl: float = 0.0
    rows: int = 0
    dropped: bool = False
    error: float = 0.0
    size: float = 0.0


@torch.inference_mode()
def measure_layers(
    model: Any,
    ids: Tensor,
    plan: Sequence[str],
    protocol: str,
    chunk: int,
    progress: Callable[[], None] | None = None,
    stats: Sequence[KeyStats | None] | None = None,
) -> list[LayerRow]:
    """Measure specifications on every layer.

    Args:
        model: without an attached memory; its attention is routed through Tessera.
        ids: (1, tokens), one window.
        plan: specifications; "dense" is left out.
        protocol: "streaming": calls of `chunk` tokens, each token is exact for its own call; "paper": one call, and all is
            quantised before it is read.
        chunk: tokens of a call in the streaming protocol.
        progress: called after each layer.
        stats: see `compare`.

    Raises:
        ValueError: for a specification with "tc", or a model with a memory, which has no rows of weights over keys.
    """
    check_layers(model, plan)
    packed = protocol == "paper"
    specs = [spec for spec in plan if spec != "dense"]
    sliding = [window for _, window in read_config(model.config)[1]]
    caches = [new_cache(spec, model, "quantized" if packed else "exact", stats) for spec in specs]
    found: dict[int, list[_Sums]] = {}

    def see(call: Call) -> None:
        if call.query.shape[0] != 1 or call.key.shape[2] != call.query.shape[2]:
            raise ValueError("this model calls its attention in parts, so its layers cannot be measured")
        sums, tokens = [], call.query.shape[2]
        for cache in caches:
            more = filler(str(cache.spec), tokens) if packed else 0
            sums.append(_measure(call, cache.layers[call.layer], sliding[call.layer], tokens if packed else chunk, more))
            cache.layers[call.layer].reset()  # one layer's tokens at a time
        found[call.layer] = sums
        if progress is not None:
            progress()

    enable(model)
    with observed(see):
        model(input_ids=ids, use_cache=False)
    return [
        LayerRow(protocol, spec, layer, None if s.dropped else s.kl / s.rows, (s.error / max(s.size, 1e-300)) ** 0.5)
        for number, spec in enumerate(specs)
        for layer, s in ((layer, sums[number]) for layer, sums in sorted(found.items()))
    ]


def check_layers(model: Any, plan: Sequence[str]) -> None:
    """Refuse specifications and models without rows of attention weights.

    Raises:
        ValueError: saying what.
    """
    memories = [spec for spec in plan if parse(spec).tensor_cache]
    if memories or attached_memory(model) is not None:
        what = repr(memories[0]) if memories else "a model with an attached memory"
        raise ValueError(f"layers are measured by their attention weights over keys; {what} reads a memory that has none")


def _measure(call: Call, layer: TesseraLayer, window: int | None, step: int, more: int) -> _Sums:
    """Pass one layer's tokens through a layer of a cache, and compare with exact attention.

    Args:
        call: with all tokens of one sequence.
        layer: layer of a new cache.
        window: window of the model's layer, or None.
        step: tokens at a time.
        more: tokens behind them that make the last block whole; where all are taken at once.
    """
    sums = _Sums()
    tokens = call.query.shape[2]
    for start in range(0, tokens, step):
        stop = min(tokens, start + step)
        places = torch.arange(start, stop + more, device=call.query.device)
        q, k, v = (x[:, :, places % tokens] for x in (call.query, call.key, call.value))
        mask = _mask(window, start, stop + more, q.device)
        with _read(layer) as held:
            given = attention_forward(call.module, q, *layer.update(k, v), mask, **_options(call))[0]
        _compare(call, layer.policy, window, start, stop, held, given, sums)
    return sums


@contextmanager
def _read(layer: TesseraLayer) -> Iterator[list[tuple[int, Tensor]]]:
    """Record the decoded keys that attention reads of a layer: (place of the first, (1, kv_heads, n, head_dim))."""
    found: list[tuple[int, Tensor]] = []
    opened = layer.begin_step

    def noted(*arguments: Any, **options: Any) -> Any:
        steps = opened(*arguments, **options)
        for step, _ in steps:
            for source in step.sources:
                if isinstance(source.held, CompressedKV):
                    found.append((source.start, torch.cat([keys.decode() for keys, _ in source.held.pages], dim=2)))
                else:
                    found.append((source.start, source.held[0].clone()))
        return steps

    layer.begin_step = noted  # type: ignore[method-assign]
    try:
        yield found
    finally:
        del layer.begin_step


def _mask(window: int | None, start: int, stop: int, device: torch.device) -> Tensor | None:
    """Make a model's mask for the queries [start, stop) of a layer with a sliding window; None without one."""
    if window is None:
        return None
    first = max(0, start - window + 1)
    distance = torch.arange(start, stop, device=device)[:, None] - torch.arange(first, stop, device=device)
    return ((distance >= 0) & (distance < window))[None, None]


def _options(call: Call) -> dict[str, Any]:
    return {name: call.options[name] for name in ("scaling", "softcap", "s_aux") if name in call.options}


def _compare(
    call: Call,
    policy: RetentionPolicy,
    window: int | None,
    start: int,
    stop: int,
    held: list[tuple[int, Tensor]],
    given: Tensor,
    sums: _Sums,
) -> None:
    """Add the errors of the queries [start, stop) to the sums. given: (1, stop - start or more, q_heads, head_dim)."""
    exact, value = call.key[:, :, :stop].float(), call.value[:, :, :stop].float()
    decoded, there = torch.zeros_like(exact), torch.zeros(stop, dtype=torch.bool, device=exact.device)
    for first, keys in held:
        size = max(0, min(keys.shape[2], stop - first))
        decoded[:, :, first : first + size] = keys[:, :, :size].float()
        there[first : first + size] = True
    for a in range(start, stop, QUERIES):
        b = min(stop, a + QUERIES)
        distance = torch.arange(a, b, device=exact.device)[:, None] - torch.arange(stop, device=exact.device)
        seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        logp = _log_weights(call, call.query[:, :, a:b].float(), exact, seen)
        p = logp.exp()
        group = logp.shape[1] // value.shape[1]
        wanted = p[..., :stop] @ value.repeat_interleave(group, dim=1)
        gap = given[:, a - start : b - start].transpose(1, 2).double() - wanted.double()
        sums.error += float(gap.square().sum())
        sums.size += float(wanted.double().square().sum())
        sums.rows += logp.shape[1] * (b - a)
        hidden = ~there
        if policy.window is not None:
            columns = torch.arange(stop, device=exact.device)
            hidden = hidden | ((distance >= policy.window) & (columns >= policy.sink))
        if sums.dropped or bool((seen & hidden).any()):
            sums.dropped = True
            continue
        logq = _log_weights(call, call.query[:, :, a:b].float(), decoded, seen)
        sums.kl += float(torch.where(p > 0, p * (logp - logq), 0.0).sum(dtype=torch.float64))


def _log_weights(call: Call, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """Logarithms of the weights of queries over keys and, as the last column, of logits that take part in the softmax.

    q: (1, q_heads, n, head_dim); k: (1, kv_heads, slots, head_dim); seen: (n, slots) bool. Returns (1, q_heads, n, slots or
    slots + 1), minus infinity where nothing is seen.
    """
    scores = (q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(-1, -2)) * call.scale
    softcap, s_aux = call.options.get("softcap"), call.options.get("s_aux")
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen, float("-inf"))
    if s_aux is not None:
        scores = torch.cat((scores, s_aux.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), dim=-1)
    return scores.log_softmax(-1)
