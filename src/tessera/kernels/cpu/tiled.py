"""Attention of many queries on a CPU: PyTorch's flash attention, tile by tile, joined by log-sum-exp.

The definition multiplies whole matrices and writes their scores to memory. PyTorch's flash attention for CPUs keeps them in
cache and returns the log-sum-exp, so partial results can be merged. Codes are decoded a tile at a time, once for all queries.
`benchmarks/prefill_attention.py` measures where that is fastest, and `attend` decides accordingly.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from tessera.kernels import cpu, reference
from tessera.kernels.compressed_kv import CompressedKV
from tessera.kernels.joint import JointFormat
from tessera.kernels.params import AttendParams

#: Maximum bytes of decoded or widened keys and values at once, unless `BLOCK` tokens take more.
TILE_BYTES = 64 << 20
#: Minimum number of tokens of a tile.
BLOCK = 64
#: Maximum number of queries of a tile with a window.
WINDOW_TILE = 512
#: Number of query rows of a key head from which decoding a tile is faster: for codes without a kernel, and for those with a
#: kernel without integer products, with AVX-512 and with less.
NO_KERNEL, WIDE_KERNEL, SLOW_KERNEL = 16, 768, 192

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def attend(q: Tensor, pages: CompressedKV, params: AttendParams, *, level: str | None = None) -> tuple[Tensor, Tensor]:
    """Compute `tessera.kernels.reference.attend` the fastest way on a CPU. `level`: see `tessera.kernels.cpu.attend`."""
    if cpu.attend_refusal(q, pages) is None:
        level = level or cpu.levels()[-1]
        enough = WIDE_KERNEL if level == "avx512" else SLOW_KERNEL
        few = q.shape[1] // pages.shape[1] * q.shape[2] < enough
        if few or _fast(pages, level) or tiled_refusal(q, pages, params) is not None:
            return cpu.attend(q, pages, params, level=level)
    return attend_tiled(q, pages, params)


def attend_exact(q: Tensor, k: Tensor, v: Tensor, params: AttendParams, *, level: str | None = None) -> tuple[Tensor, Tensor]:
    """Compute `tessera.kernels.reference.attend_exact` by the fastest implementation on a CPU."""
    if cpu.attend_exact_refusal(q, k, v) is None:
        return cpu.attend_exact(q, k, v, params, level=level)
    return attend_exact_tiled(q, k, v, params)


def attend_refusal(q: Tensor, pages: CompressedKV, params: AttendParams) -> str | None:
    """Say why `attend` cannot be used, or return None if it can."""
    why = cpu.attend_refusal(q, pages)
    return why if why is None or tiled_refusal(q, pages, params) is not None else None


def attend_exact_refusal(q: Tensor, k: Tensor, v: Tensor, params: AttendParams) -> str | None:
    """Say why `attend_exact` cannot or should not be used, or return None."""
    why = cpu.attend_exact_refusal(q, k, v)
    return why if why is None or exact_tiled_refusal(q, k, v, params) is not None else None


def _fast(pages: CompressedKV, level: str) -> bool:
    """Whether codes are multiplied as integers, which is faster than dense keys for any number of queries."""
    # NEON alone multiplies as many integers at a time as floats.
    return level not in ("portable", "neon") and all(isinstance(form, JointFormat) for form in pages.form())


def tiled_refusal(q: Tensor, pages: CompressedKV, params: AttendParams) -> str | None:
    """Say why `attend_tiled` cannot or should not be used, or return None."""
    if q.device.type != "cpu" or pages.pages[0][0].device.type != "cpu":
        return "PyTorch's flash attention that tells its log-sum-exp is for CPUs"
    if torch.is_grad_enabled() and q.requires_grad:
        return "its result has no gradients"
    if q.shape[1] // pages.shape[1] * q.shape[2] < NO_KERNEL:
        return "so few queries are not worth a decoded tile"
    if params.start is not None and params.window is not None:
        return "with a window it would decode most tiles three times"
    return _refusal(q, params)


def exact_tiled_refusal(q: Tensor, k: Tensor, v: Tensor, params: AttendParams) -> str | None:
    """Say why `attend_exact_tiled` cannot or should not be used, or return None."""
    if any(x.device.type != "cpu" for x in (q, k, v)):
        return "PyTorch's flash attention that tells its log-sum-exp is for CPUs"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "its result has no gradients"
    if k.dtype not in _FLOATS or v.dtype not in _FLOATS or k.shape != v.shape or not k.numel():
        return f"it is for keys like values, in 16 or 32 bits, not {k.dtype} {tuple(k.shape)} and {v.dtype} {tuple(v.shape)}"
    if params.start is not None and params.window is not None and params.window < BLOCK:
        return f"a window of {params.window} keys is not worth its tiles"
    return _refusal(q, params)


def _refusal(q: Tensor, params: AttendParams) -> str | None:
    if q.dtype not in _FLOATS or not q.numel():
        return f"it is for queries in 16 or 32 bits, not {q.dtype} {tuple(q.shape)}"
    if params.mask is not None or params.softcap is not None:
        return "it knows neither masks nor soft-capping"
    if params.start is not None and params.start < 0 and params.window is None:
        return "every query must see a key"
    return None


def attend_tiled(q: Tensor, pages: CompressedKV, params: AttendParams) -> tuple[Tensor, Tensor]:
    """`tessera.kernels.reference.attend` without a mask, soft-capping or a window; one decoded tile at a time."""
    return _over_tiles(q, pages.shape, pages.decode, params, _tile(pages.shape))


def attend_exact_tiled(q: Tensor, k: Tensor, v: Tensor, params: AttendParams) -> tuple[Tensor, Tensor]:
    """`tessera.kernels.reference.attend_exact` without a mask or soft-capping; 16-bit numbers are widened a tile at a time."""
    reference.check_exact(q, k, v, params)
    # Of a query whose only score in a tile is -inf or NaN, flash attention returns a log-sum-exp of 0. A sum that overflows
    # costs time only.
    if not all(np.isfinite(x.sum(dtype=torch.float32).numpy()) for x in (q, k)):
        return reference.attend_exact(q, k, v, params)
    if params.start is not None and params.window is not None:
        return _in_window(q, k, v, params.scale, params.start, params.window)
    step = k.shape[2] if k.dtype == v.dtype == torch.float32 else _tile(k.shape)
    return _over_tiles(q, tuple(k.shape), lambda a, b: (k[:, :, a:b], v[:, :, a:b]), params, step)


def _tile(shape: tuple[int, ...]) -> int:
    """Tokens of a tile of keys and values (batch, kv_heads, tokens, head_dim)."""
    # During decoding there are at most two copies in float32.
    return max(BLOCK, TILE_BYTES // (16 * shape[0] * shape[1] * shape[3]) // BLOCK * BLOCK)


def _over_tiles(
    q: Tensor, shape: tuple[int, ...], tile: Callable[[int, int], tuple[Tensor, Tensor]], params: AttendParams, step: int
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, dim = q.shape
    rows, kv_heads, count, own = shape
    if batch != rows or heads % kv_heads or dim != own:
        raise ValueError(f"queries {tuple(q.shape)} do not fit keys {tuple(shape)}")
    q, start = q.float(), params.start
    end = count if start is None else min(count, start + tokens)
    # Every query sees the keys before `split`; query i sees i + 1 of the others at most.
    split = count if start is None else min(start, count)
    cuts = sorted({*range(0, split, step), *range(split, end, step), end})
    found: tuple[Tensor, Tensor] | None = None
    for a, b in pairwise(cuts):
        causal, first = a >= split, max(0, a - split)
        k, v = tile(a, b)
        part = _flash(q[:, :, first:], k.float(), v.float(), params.scale, causal)
        if found is None:
            found = part
        else:
            _join(found, part, first)
    assert found is not None
    return found


def _in_window(q: Tensor, k: Tensor, v: Tensor, scale: float, start: int, window: int) -> tuple[Tensor, Tensor]:
    """Attention of query i to the keys from number start + i - window + 1 to start + i, at most `window` queries at a time.

    q: (batch, q_heads, tokens, head_dim); k, v: (batch, kv_heads, n, head_dim). Returns the shape of q, and its first three
    sizes, in float32: the results, 0 where a query sees nothing, and the logarithms of their sums, -inf there.

    Keys of such a tile are of three kinds: those that all of its queries see, its own, which they see causally, and the oldest,
    of which each query sees one fewer than the one before it. These are causal too, from behind.
    """
    q = q.float()
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full(q.shape[:3], -torch.inf)
    tokens, count, size = q.shape[2], k.shape[2], min(window, WINDOW_TILE)
    for a in range(max(0, -start), tokens, size):  # queries before all keys see none
        b = min(a + size, tokens)
        first, last = start + a, start + b  # the numbers of the tile's queries among the keys
        own, oldest = slice(a, b), max(0, first - window + 1)
        found = out[:, :, own], lse[:, :, own]
        every, old = slice(max(0, last - window), min(first, count)), slice(oldest, min(last - window, count))
        if first < count:
            _join(found, _flash(q[:, :, own], *_floats(k, v, slice(first, min(last, count))), scale, True), 0)
        if every.start < every.stop:
            _join(found, _flash(q[:, :, own], *_floats(k, v, every), scale, False), 0)
        if old.start < old.stop:
            # The first of these queries sees them all; the last, and as many as end beyond the keys, none.
            few = b - a - 1 - (last - window - old.stop)
            oldest_k, oldest_v = _floats(k, v, old)
            part = _flash(q[:, :, a : a + few].flip(2), oldest_k.flip(2), oldest_v.flip(2), scale, True)
            _join((found[0][:, :, :few], found[1][:, :, :few]), (part[0].flip(2), part[1].flip(2)), 0)
    return out, lse


def _floats(k: Tensor, v: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Return these keys and values in float32, (batch, kv_heads, n, head_dim) each."""
    return k[:, :, part].float(), v[:, :, part].float()


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention in float32; causal: query i sees the keys up to number i."""
    batch, heads, tokens, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    if causal and group > 1:
        # Each key head becomes a row, whose keys are shared by its query heads.
        q = q.reshape(batch * kv_heads, group, tokens, dim)
        k, v = (x.reshape(batch * kv_heads, 1, *x.shape[2:]).expand(-1, group, -1, -1) for x in (k, v))
    else:
        # Query heads that share keys are folded into the queries of their key head.
        q = q.reshape(batch, kv_heads, group * tokens, dim)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(q, k, v, 0.0, causal, scale=scale)
    return out.reshape(batch, heads, tokens, dim), lse.reshape(batch, heads, tokens)


def _join(found: tuple[Tensor, Tensor], part: tuple[Tensor, Tensor], first: int) -> None:
    """Merge a part's result into those of the queries from number `first` on; changes `found`."""
    out, lse = found[0][:, :, first:], found[1][:, :, first:]
    total = torch.logaddexp(lse, part[1])
    out.mul_(torch.exp(lse - total).unsqueeze(-1)).addcmul_(part[0], torch.exp(part[1] - total).unsqueeze(-1))
    lse.copy_(total)
