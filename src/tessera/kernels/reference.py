"""The definition, in plain PyTorch, of attention over one part of a sequence and of the merge of parts.

Softmax attention over keys 1..n can be computed from any partition of them: each part gives its own normalised output and
the log of its sum of exponentials (lse), and `merge` weighs the outputs by exp(lse). Queries of a group share their key head,
so the group is folded into the query axis and keys and values are never repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tessera.kernels.compressed_kv import CompressedKV
from tessera.kernels.params import AttendParams
from tessera.kernels.precision import without_autocast

#: Maximum number of scores in memory at once (4 bytes each).
SCORES = 1 << 23
#: Minimum and maximum number of keys that are read, and decoded if packed, at once. Every codec's group divides the minimum.
FEW, MANY = 256, 1024


@without_autocast
def attend(
    q: Tensor,
    pages: CompressedKV,
    params: AttendParams,
) -> tuple[Tensor, Tensor]:
    """Attention over packed keys and values, decoded block by block.

    Args:
        q: (batch, q_heads, q_tokens, head_dim).
        pages: keys and values, (batch, kv_heads, tokens, head_dim); kv_heads divides q_heads.
        params: scale, mask and positions, see `AttendParams`.

    Returns:
        out: (batch, q_heads, q_tokens, head_dim) float32, 0 where a query sees nothing.
        lse: (batch, q_heads, q_tokens) float32, -inf where a query sees nothing.
    """
    return _online(q, pages.decode, pages.shape, params)


@without_autocast
def attend_exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    params: AttendParams,
) -> tuple[Tensor, Tensor]:
    """Do what `attend` does over keys and values that are not packed. k, v: (batch, kv_heads, tokens, head_dim)."""
    check_exact(q, k, v, params)

    def block(a: int, b: int) -> tuple[Tensor, Tensor]:
        return k[:, :, a:b], v[:, :, a:b]

    return _online(q, block, tuple(k.shape), params)


def check_exact(q: Tensor, k: Tensor, v: Tensor, params: AttendParams) -> None:
    """Refuse keys, values or a mask that do not fit the queries.

    Raises:
        ValueError: naming both shapes.
    """
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"keys {tuple(k.shape)} and values {tuple(v.shape)} differ in shape")
    _check(q, tuple(k.shape), params)


def _check(q: Tensor, keys: tuple[int, ...], params: AttendParams) -> None:
    batch, heads, tokens, dim = q.shape
    if keys[0] != batch or heads % keys[1] or keys[3] != dim:
        raise ValueError(f"queries {tuple(q.shape)} do not fit keys {keys}")
    params.check(tokens, keys[2])


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge partial results into one softmax over the keys of all parts.

    Args:
        parts: (out, lse) pairs as `attend` returns them, at least one.

    Returns:
        out and lse, of the same shapes.
    """
    if len(parts) == 1:
        return parts[0]
    lse = torch.stack([lse for _, lse in parts])
    total = torch.logsumexp(lse, dim=0)
    # Where nothing is seen all weights are exp(-inf - -inf); 0 is meant.
    weight = torch.exp(lse - total.masked_fill(total == -math.inf, 0.0))
    out = parts[0][0] * weight[0].unsqueeze(-1)
    for (part, _), w in zip(parts[1:], weight[1:], strict=True):
        out = out + part * w.unsqueeze(-1)
    return out, total


def _online(
    q: Tensor,
    block: Callable[[int, int], tuple[Tensor, Tensor]],
    keys: tuple[int, ...],
    params: AttendParams,
) -> tuple[Tensor, Tensor]:
    """Online softmax over blocks of keys, for tiles of queries."""
    batch, heads, tokens, _ = q.shape
    kv_heads, count = keys[1], keys[2]
    _check(q, keys, params)
    tile = max(1, min(tokens, SCORES // (batch * heads * FEW)))
    step = max(FEW, min(MANY, SCORES // (batch * heads * tile) // FEW * FEW))
    if tile == tokens:
        return _tile(q, block, kv_heads, count, params, step)
    outs, lses = [], []
    for a in range(0, tokens, tile):
        b = min(a + tile, tokens)
        out, lse = _tile(q[:, :, a:b], block, kv_heads, count, params.queries(a, b), step)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _tile(
    q: Tensor,
    block: Callable[[int, int], tuple[Tensor, Tensor]],
    kv_heads: int,
    count: int,
    params: AttendParams,
    step: int,
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, dim = q.shape
    group = heads // kv_heads
    folded = (q.float() * params.scale).reshape(batch, kv_heads, group * tokens, dim)
    top = q.new_full((batch, heads, tokens, 1), -math.inf, dtype=torch.float32)
    total = torch.zeros_like(top)
    out: Tensor | None = None
    begin, last = params.keys(count, tokens)
    for a in range(begin // step * step, last, step):
        b = min(a + step, last)
        k, v = block(a, b)
        scores = (folded @ k.float().transpose(-1, -2)).view(batch, heads, tokens, b - a)
        if params.softcap is not None:
            scores = torch.tanh(scores / params.softcap) * params.softcap
        seen = None if params.mask is None else params.mask[..., a:b]
        rule = _positions(a, b, tokens, params.start, params.window, q.device)
        if rule is not None:
            seen = rule if seen is None else seen & rule
        if seen is not None:
            scores = scores.masked_fill(~seen, -math.inf)
        new = torch.maximum(top, scores.amax(-1, keepdim=True))
        # A query that has seen no key yet has a maximum of -inf; subtracting 0 instead keeps its weights 0.
        base = new.masked_fill(new == -math.inf, 0.0)
        weight = torch.exp(scores - base)
        keep = torch.exp(top - base)
        total = total * keep + weight.sum(-1, keepdim=True)
        part = (weight.view(batch, kv_heads, group * tokens, b - a) @ v.float()).view(batch, heads, tokens, -1)
        out = part if out is None else out * keep + part
        top = new
    if out is None:
        out = q.new_zeros((batch, heads, tokens, dim), dtype=torch.float32)
    lse = (top + torch.log(total)).squeeze(-1)
    return out / total.masked_fill(total == 0, 1.0), lse


def _positions(a: int, b: int, tokens: int, start: int | None, window: int | None, device: torch.device) -> Tensor | None:
    """Return (tokens, b - a) bool of the keys that positions allow, or None if they allow all."""
    if start is None:
        return None
    causal, near = b - 1 > start, window is not None and a < start + tokens - window
    if not causal and not near:
        return None
    query = torch.arange(start, start + tokens, device=device)[:, None]
    key = torch.arange(a, b, device=device)
    allowed = key <= query
    if near and window is not None:
        allowed &= key > query - window
    return allowed
