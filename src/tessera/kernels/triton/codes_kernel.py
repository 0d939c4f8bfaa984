"""Unpacking of codes on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read_codes(
    base, seen, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr
):
    """Load codes (BLOCK, WIDTH) of the rows `seen`, packed contiguously from the address `base` on.

    ALIGN divides the address and the bytes of a row.
    """
    ROW_BYTES: tl.constexpr = (CHUNKS * BITS + 7) // 8
    tokens = tl.arange(0, BLOCK)
    chunks = tl.arange(0, WIDTH)
    if BITS == 8:
        row = tl.multiple_of(base.to(tl.pointer_type(tl.uint8)), ALIGN) + tokens[:, None] * ROW_BYTES
        return tl.load(row + chunks[None, :], mask=seen[:, None] & (chunks < CHUNKS)[None, :], other=0).to(tl.int32)
    if BITS == 16 and ALIGN % 2 == 0:
        row = tl.multiple_of(base.to(tl.pointer_type(tl.uint16)), ALIGN) + tokens[:, None] * (ROW_BYTES // 2)
        return tl.load(row + chunks[None, :], mask=seen[:, None] & (chunks < CHUNKS)[None, :], other=0).to(tl.int32)
    if BITS == 12 and CHUNKS % 4 == 0 and ALIGN % 2 == 0:
        # Three halves of words hold four codes.
        four = tl.arange(0, WIDTH // 4)
        row = tl.multiple_of(base.to(tl.pointer_type(tl.uint16)), ALIGN) + tokens[:, None] * (ROW_BYTES // 2)
        inside = seen[:, None] & (4 * four < CHUNKS)[None, :]
        low = tl.load(row + 3 * four[None, :], mask=inside, other=0).to(tl.int32)
        middle = tl.load(row + 3 * four[None, :] + 1, mask=inside, other=0).to(tl.int32)
        high = tl.load(row + 3 * four[None, :] + 2, mask=inside, other=0).to(tl.int32)
        early = tl.join(low & 0xFFF, (low >> 12) | ((middle & 0xFF) << 4))
        late = tl.join((middle >> 8) | ((high & 0xF) << 8), high >> 4)
        return tl.reshape(tl.permute(tl.join(early, late), (0, 1, 3, 2)), (BLOCK, WIDTH))
    seen = seen[:, None] & (chunks < CHUNKS)[None, :]
    if BITS == 32 and ALIGN % 4 == 0:
        row = tl.multiple_of(base.to(tl.pointer_type(tl.int32)), ALIGN) + tokens[:, None] * (ROW_BYTES // 4)
        return tl.load(row + chunks[None, :], mask=seen, other=0)
    bit = chunks * BITS
    EVEN: tl.constexpr = BITS & -BITS  # the largest power of two that divides the bits at which codes begin
    MASK: tl.constexpr = -1 if BITS == 32 else (1 << BITS) - 1
    if BITS - EVEN <= 16 and ALIGN % 2 == 0:
        # Two halves of a word contain a code wherever it begins. Nothing beyond the row may be read.
        half = bit >> 4
        row = tl.multiple_of(base.to(tl.pointer_type(tl.uint16)), ALIGN) + tokens[:, None] * (ROW_BYTES // 2)
        inside = seen & (half + 1 < ROW_BYTES // 2)[None, :]
        wide = tl.load(row + half[None, :], mask=seen, other=0).to(tl.int32)
        wide |= tl.load(row + (half + 1)[None, :], mask=inside, other=0).to(tl.int32) << 16
        return (wide >> (bit & 15)[None, :]) & MASK
    byte = bit >> 3
    row = tl.multiple_of(base.to(tl.pointer_type(tl.uint8)), ALIGN) + tokens[:, None] * ROW_BYTES
    wide = tl.load(row + byte[None, :], mask=seen, other=0).to(tl.int32)
    for i in tl.static_range(1, (BITS - (EVEN if EVEN < 8 else 8) + 15) // 8):
        inside = seen & (byte + i < ROW_BYTES)[None, :]
        wide |= tl.load(row + (byte + i)[None, :], mask=inside, other=0).to(tl.int32) << (8 * i)
    return (wide >> (bit & 7)[None, :]) & MASK
