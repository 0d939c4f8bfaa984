"""Decoding of packed vectors on a GPU, before they are rotated back: numbers times the lengths of their vectors."""

from __future__ import annotations

import triton
import triton.language as tl

from tessera.kernels.triton.read_kernel import read_vectors


@triton.jit(do_not_specialize=["tokens"])
def decode_kernel(
    codes,  # (lines, tokens, bytes) uint8, contiguous within a line
    scale,  # (lines, tokens), likewise
    table,  # table of LOOKUP
    moves,  # see `attend_kernel`
    scales,  # (256,) float32
    out,  # (lines, tokens, 4 CHUNKS) float32, its channels ordered
    codes_line,  # bytes from one line to the next
    scale_line,
    step,  # see `attend_kernel`
    tokens,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    ALIGN: tl.constexpr,
    LOOKUP: tl.constexpr,
    MOVE_BITS: tl.constexpr,
    FIELD: tl.constexpr,
    POINTS: tl.constexpr,
    LENGTH: tl.constexpr,
    WORDS: tl.constexpr,
    ZERO: tl.constexpr,
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
    at_codes = (codes + line * codes_line + first * ROW_BYTES).to(tl.int64)
    at_scale = (scale + line * scale_line + first).to(tl.int64)
    one, two, length = read_vectors(
        at_codes,
        at_scale,
        at_scale,
        here,
        table,
        moves,
        scales,
        CHUNKS,
        WIDTH,
        BITS,
        ALIGN,
        LOOKUP,
        MOVE_BITS,
        FIELD,
        POINTS,
        LENGTH,
        WORDS,
        False,
        BLOCK,
    )
    length *= step
    at = (line * tokens + token)[:, None] * dim + pair[None, :]
    real = here[:, None] & (pair < 2 * CHUNKS)[None, :]
    tl.store(out + at, (one.to(tl.float32) - ZERO * 2.0**-24) * length[:, None], mask=real)
    tl.store(out + at + dim // 2, (two.to(tl.float32) - ZERO * 2.0**-24) * length[:, None], mask=real)
