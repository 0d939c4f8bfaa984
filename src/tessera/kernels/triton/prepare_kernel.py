"""The preparation of queries for attention on a GPU in one launch: scale, rotate, reorder, and convert to half precision."""

from __future__ import annotations

import triton
import triton.language as tl

#: Number of rows of a program, and of channels that are rotated at once.
TILE, SLICE = 16, 32


@triton.jit(do_not_specialize=["rows"])
def prepare_kernel(
    q,  # (rows, dim), any floating point
    rotation,  # (dim, dim) float32, y = x @ rotation, its columns ordered
    query,  # (rows, dim) float32: q times the scale
    shifted,  # (rows, dim) float16: the same rotated, less `unit`
    unit,  # (rows,) float32: the largest magnitude of each rotated row
    scale,
    rows,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # DIM, rounded up
    TILE: tl.constexpr,
    SLICE: tl.constexpr,
):
    """Prepare one tile of rows."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    channel = tl.arange(0, WIDTH)
    real_row = row < rows
    real_channel = channel < DIM
    whole = tl.zeros((TILE, WIDTH), tl.float32)
    for part in range(0, DIM, SLICE):
        inner = part + tl.arange(0, SLICE)
        at = row.to(tl.int64)[:, None] * DIM + inner[None, :]
        real = real_row[:, None] & (inner < DIM)[None, :]
        x = tl.load(q + at, mask=real, other=0.0).to(tl.float32) * scale
        tl.store(query + at, x, mask=real)
        entries = rotation + inner[:, None] * DIM + channel[None, :]
        y = tl.load(entries, mask=(inner < DIM)[:, None] & real_channel[None, :], other=0.0)
        whole = tl.dot(x, y, whole, input_precision="tf32x3")  # as exact as float32
    most = tl.maximum(tl.max(tl.abs(whole), axis=1), 1e-30)
    tl.store(unit + row, most, mask=real_row)
    to = shifted + row.to(tl.int64)[:, None] * DIM + channel[None, :]
    tl.store(to, (whole / most[:, None]).to(tl.float16), mask=real_row[:, None] & real_channel[None, :])
