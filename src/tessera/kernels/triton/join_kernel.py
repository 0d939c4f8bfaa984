"""The merge of the splits of `attend_kernel` into one softmax, in one launch: `tessera.kernels.reference.merge`."""

from __future__ import annotations

import triton
import triton.language as tl

#: Number of splits that are added at once.
TOGETHER = 16


@triton.jit(do_not_specialize=["splits", "rows"])
def join_kernel(
    out,  # (splits, rows, dim) float32
    lse,  # (splits, rows) float32
    joined,  # (rows, dim) float32
    total,  # (rows,) float32
    splits,
    rows,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # DIM, rounded up
    SPLITS: tl.constexpr,  # number of splits, rounded up to a power of two
    TOGETHER: tl.constexpr,
):
    """Merge the splits of one row."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    every = tl.arange(0, SPLITS)
    logs = tl.load(lse + every.to(tl.int64) * rows + row, mask=every < splits, other=-float("inf"))
    top = tl.max(logs, axis=0)
    base = tl.where(top == -float("inf"), 0.0, top)
    weights = tl.sum(tl.exp(logs - base), axis=0)
    whole = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, splits, TOGETHER):
        split = (first + tl.arange(0, TOGETHER)).to(tl.int64)
        real = split < splits
        weight = tl.exp(tl.load(lse + split * rows + row, mask=real, other=-float("inf")) - base)
        at = (split * rows + row)[:, None] * DIM + channel[None, :]
        part = tl.load(out + at, mask=real[:, None] & (channel < DIM)[None, :], other=0.0)
        whole += tl.sum(part * weight[:, None], axis=0)
    tl.store(joined + row * DIM + channel, whole / tl.where(weights == 0, 1.0, weights), mask=channel < DIM)
    tl.store(total + row, top + tl.log(weights))
