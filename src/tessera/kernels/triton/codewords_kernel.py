"""Codewords of joint codebooks on a GPU, looked up in the ways of `tessera.kernels.triton.formats.LOOKUPS`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _swapped(pair):
    """Exchange the halves of a word."""
    return (pair << 16) | ((pair >> 16) & 0xFFFF)


@triton.jit
def _signed(first, second, move):
    """Apply the signs of a move to pairs; -0x7FFF8000 is the sign of either half."""
    return first ^ (move & -0x7FFF8000), second ^ ((move << 1) & -0x7FFF8000)


@triton.jit
def _moved_bytes(point, move):
    """Make the two pairs of a point whose components 0, 2, 1, 3 are the bytes of a word: a sign and seven bits each."""
    point = tl.where((move & 1) != 0, _swapped(point), point)
    first = point >> (move & 8)
    second = point >> (~move & 8)
    one = (first & 0x007F007F) | (((first << 8) ^ move) & -0x7FFF8000)
    two = (second & 0x007F007F) | (((second << 8) ^ (move << 1)) & -0x7FFF8000)
    return one, two


@triton.jit
def _moved_pairs(first, second, move):
    """Make the two pairs of a point whose pairs are two words."""
    other = (move & 8) != 0
    one, two = tl.where(other, second, first), tl.where(other, first, second)
    swap = (move & 1) != 0
    return _signed(tl.where(swap, _swapped(one), one), tl.where(swap, _swapped(two), two), move)


@triton.jit
def gathered(held, at, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Gather words of a table that shared memory holds: at (BLOCK, WIDTH)."""
    return tl.reshape(tl.gather(held, tl.reshape(at, (BLOCK * WIDTH,)), 0), (BLOCK, WIDTH))


@triton.jit
def codewords(
    codes,
    table,
    moves,
    LOOKUP: tl.constexpr,
    MOVE_BITS: tl.constexpr,
    FIELD: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Look up the first and the second pairs of codewords of a joint codebook."""
    number = codes & ((1 << MOVE_BITS) - 1)
    point = codes >> MOVE_BITS
    if LOOKUP == "halves":
        both = tl.load(table + codes)
        one, two = both.to(tl.int32), (both >> 32).to(tl.int32)
    elif LOOKUP == "signs":
        move = tl.load(moves + number)
        both = tl.load(table + (point * 4 + (move & 3)))
        one, two = _signed(both.to(tl.int32), (both >> 32).to(tl.int32), move)
    elif LOOKUP == "held":
        held = tl.load(table + tl.arange(0, POINTS))
        held_moves = tl.load(moves + tl.arange(0, 1 << MOVE_BITS))
        word = gathered(held, point, BLOCK, WIDTH)
        move = gathered(held_moves, number, BLOCK, WIDTH)
        one, two = _moved_bytes(word, move)
    elif FIELD == 8:
        one, two = _moved_bytes(tl.load(table + point), tl.load(moves + number))
    else:
        both = tl.load(table + point)
        one, two = _moved_pairs(both.to(tl.int32), (both >> 32).to(tl.int32), tl.load(moves + number))
    return one, two
