"""Decoding of packed vectors on a GPU, before they are rotated back: codewords times the lengths of their vectors."""

from __future__ import annotations

import triton
import triton.language as tl

from tessera.kernels.triton.attend_kernel import _codes, _look_up


@triton.jit(do_not_specialize=["tokens"])
def decode_kernel(
    codes,  # (lines, tokens, bytes) uint8, contiguous within a line
    scale,  # (lines, tokens) uint8, likewise
    table,  # table of LOOKUP
    moves,  # see `attend_kernel`
    scales,  # (256,) float32
    out,  # (lines, tokens, 4 CHUNKS) float32, its channels ordered
    codes_line,  # bytes from one line to the next
    scale_line,
    step,  # 2^24 times that of the codebook
    tokens,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    ALIGN: tl.constexpr,
    LOOKUP: tl.constexpr,
    MOVE_BITS: tl.constexpr,
    FIELD: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Decode one block of tokens of one line."""
    dim: tl.constexpr = 4 * CHUNKS
    ROW_BYTES: tl.constexpr = (CHUNKS * BITS + 7) // 8
    line = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    token = first + tl.arange(0, BLOCK)
    here = token < tokens
    pair = tl.arange(0, 2 * WIDTH)
    base = (codes + line * codes_line + first * ROW_BYTES).to(tl.int64)
    words = _codes(base, here, CHUNKS, WIDTH, BITS, ALIGN, BLOCK)
    one, two = _look_up(words, table, moves, LOOKUP, MOVE_BITS, FIELD, POINTS, BLOCK, WIDTH)
    length = tl.load(scales + tl.load(scale + line * scale_line + token, mask=here, other=0)) * step
    at = (line * tokens + token)[:, None] * dim + pair[None, :]
    real = here[:, None] & (pair < 2 * CHUNKS)[None, :]
    tl.store(out + at, one.to(tl.float32) * length[:, None], mask=real)
    tl.store(out + at + dim // 2, two.to(tl.float32) * length[:, None], mask=real)
