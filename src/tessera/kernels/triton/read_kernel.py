"""How Triton kernels read vectors: packed codes, and the tiles of half-precision numbers that tensor cores multiply.

A code stands for a chunk of four numbers. It is a codeword of a joint codebook, or the codes of the four numbers side by side,
which are packed just as densely. Of a chunk's numbers two are a pair of half-precision numbers, one word of 32 bits. All first
pairs form one tile and all second pairs another. Where codes of 2, 4 or 8 bits fill whole words, a pair consists of those that
are 16 bits apart instead, which a shift and a mask make of a word. So the channels of queries and results have the order of
`tessera.kernels.triton.tables.column_order`.

Integers, of codewords or uniform codes, are stored in the fractions of half-precision numbers without an exponent (subnormal):
n has the value n · 2^-24, and no conversion is needed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tessera.kernels.triton.codes_kernel import read_codes
from tessera.kernels.triton.codewords_kernel import codewords, gathered


@triton.jit
def _tile(pairs, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Unpack words of pairs (BLOCK, WIDTH) to (BLOCK, 2 WIDTH) float16."""
    low = pairs.to(tl.int16).to(tl.float16, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.reshape(tl.join(low, high), (BLOCK, 2 * WIDTH))


@triton.jit
def _spread(codes, FIELD: tl.constexpr):
    """Make pairs of the two lowest numbers, of FIELD bits each, of every code."""
    LOW: tl.constexpr = (1 << FIELD) - 1
    if FIELD <= 4:
        return (codes | (codes << (16 - FIELD))) & (LOW * 0x10001)
    return (codes & LOW) | ((codes << (16 - FIELD)) & (LOW << 16))


@triton.jit
def _word_pairs(words, FIELD: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Make pairs of the numbers of words that are 16 bits apart, those in the lower and in the upper bytes of halves."""
    MASK: tl.constexpr = ((1 << FIELD) - 1) * 0x10001
    if FIELD == 8:
        one, two = words & MASK, (words >> 8) & MASK
    elif FIELD == 4:
        one, two = tl.join(words & MASK, (words >> 4) & MASK), tl.join((words >> 8) & MASK, (words >> 12) & MASK)
    else:
        even, odd = tl.join(words & MASK, (words >> 4) & MASK), tl.join((words >> 2) & MASK, (words >> 6) & MASK)
        one = tl.join(even, odd)
        even, odd = tl.join((words >> 8) & MASK, (words >> 12) & MASK), tl.join((words >> 10) & MASK, (words >> 14) & MASK)
        two = tl.join(even, odd)
    return tl.reshape(one, (BLOCK, WIDTH)), tl.reshape(two, (BLOCK, WIDTH))


@triton.jit
def channels_of(pair, TILE: tl.constexpr, FIELD: tl.constexpr, WORDS: tl.constexpr):
    """Return the channels of columns of the first or second tile (TILE 0 or 1)."""
    STEP: tl.constexpr = 16 // FIELD if WORDS else 1  # from the first number of a pair to the second
    COUNT: tl.constexpr = STEP if WORDS else 2  # of a word's columns in a tile
    return pair // COUNT * (2 * COUNT) + pair % COUNT // 2 + TILE * (COUNT // 2 if WORDS else 2) + pair % 2 * STEP


@triton.jit
def _numbers(
    codes,
    here,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    ALIGN: tl.constexpr,
    FIELD: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Load codes of single numbers as pairs of integers: two tensors of words, each (BLOCK, WIDTH)."""
    if WORDS:
        words = read_codes(codes, here, CHUNKS * FIELD // 8, WIDTH * FIELD // 8, 32, ALIGN, BLOCK)
        one, two = _word_pairs(words, FIELD, BLOCK, WIDTH)
    else:
        words = read_codes(codes, here, CHUNKS, WIDTH, BITS, ALIGN, BLOCK)
        one, two = _spread(words, FIELD), _spread(words >> (2 * FIELD), FIELD)
    return one, two


@triton.jit
def _floats(pair):
    """Make half-precision numbers, 2^8 times too small, of pairs of e4m3 numbers."""
    return ((pair << 8) & -0x7FFF8000) | ((pair << 7) & 0x3F803F80)


@triton.jit
def _curve(pair, table, FIELD: tl.constexpr, TERMS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Compute levels of pairs of numbers by the polynomial of `tables.curve`."""
    # With these bits a number n is the half-precision number BASE + n / 2^(FIELD - 1), exactly.
    BASE: tl.constexpr = 1 << (10 - FIELD)
    BITS: tl.constexpr = ((25 - FIELD) << 10) * 0x10001
    MIDDLE: tl.constexpr = BASE + ((1 << FIELD) - 1) / (1 << FIELD)
    x = _tile((pair << 1) | BITS, BLOCK, WIDTH) - tl.full((), MIDDLE, tl.float16)
    square = x * x
    level = square * tl.load(table + TERMS - 1) + tl.load(table + TERMS - 2)
    for i in tl.static_range(2, TERMS):
        level = level * square + tl.load(table + TERMS - 1 - i)
    return level * x


@triton.jit
def _halved(codes, FIELD: tl.constexpr):
    """Return the codes of the first and of the second two numbers."""
    LOW: tl.constexpr = (1 << (2 * FIELD)) - 1
    return codes & LOW, (codes >> (2 * FIELD)) & LOW


@triton.jit
def _whole(pair, ZERO: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Unpack pairs of codes to the integers code - ZERO, (BLOCK, 2 WIDTH) float16."""
    # With these bits a number n is the half-precision number 1024 + n.
    return _tile(pair | 0x64006400, BLOCK, WIDTH) - tl.full((), 1024 + ZERO, tl.float16)


@triton.jit
def _each(blocks, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Repeat numbers of blocks of eight chunks, (BLOCK, WIDTH / 8), for all pairs of numbers: (BLOCK, 2 WIDTH) float16."""
    wide = tl.broadcast_to(blocks.to(tl.float16)[:, :, None], (BLOCK, WIDTH // 8, 16))
    return tl.reshape(wide, (BLOCK, 2 * WIDTH))


@triton.jit
def _read_blocks(codes, here, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, FIELD: tl.constexpr, BLOCK: tl.constexpr):
    """Read ggml's blocks of 32 numbers with a scale each: what `read_vectors` returns."""
    SIZE: tl.constexpr = 1 + 2 * FIELD  # of a block, in halves of words
    token, word, block = tl.arange(0, BLOCK), tl.arange(0, WIDTH * FIELD // 8), tl.arange(0, WIDTH // 8)
    row = codes.to(tl.pointer_type(tl.uint16)) + token[:, None] * (CHUNKS // 8 * SIZE)
    at = row + (word // FIELD * SIZE + 1 + word % FIELD * 2)[None, :]
    seen = here[:, None] & (word < CHUNKS * FIELD // 8)[None, :]
    words = tl.load(at, mask=seen, other=0).to(tl.int32) | (tl.load(at + 1, mask=seen, other=0).to(tl.int32) << 16)
    if FIELD == 8:
        words ^= -0x7F7F7F80  # signed: with the upper bit exchanged they are counted from the lowest
    one, two = _word_pairs(words, FIELD, BLOCK, WIDTH)
    seen = here[:, None] & (block < CHUNKS // 8)[None, :]
    scale = tl.load((row + (block * SIZE)[None, :]).to(tl.pointer_type(tl.float16)), mask=seen, other=0.0).to(tl.float32)
    # Relative to a token's largest scale, so that half precision holds every product.
    length = tl.maximum(tl.max(tl.abs(scale), axis=1), 1e-30)
    share = _each(scale * (1 / length)[:, None], BLOCK, WIDTH)
    ZERO: tl.constexpr = 1 << (FIELD - 1)
    return _whole(one, ZERO, BLOCK, WIDTH) * share, _whole(two, ZERO, BLOCK, WIDTH) * share, length


@triton.jit
def _read_groups(
    codes,
    scale,
    low,
    here,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    ALIGN: tl.constexpr,
    FIELD: tl.constexpr,
    WORDS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Read codes of groups with a scale and a low: what `read_vectors` returns, for keys as `scaled_queries` needs them."""
    one, two = _numbers(codes, here, CHUNKS, WIDTH, BITS, ALIGN, FIELD, WORDS, BLOCK)
    # Counted from the middle of a group, so that no sums of large numbers that cancel are rounded.
    HALF: tl.constexpr = 1 << (FIELD - 1)
    one, two = _whole(one, HALF, BLOCK, WIDTH), _whole(two, HALF, BLOCK, WIDTH)
    if KEYS:
        length = tl.full((BLOCK,), 1.0, tl.float32)
    else:
        token, block = tl.arange(0, BLOCK), tl.arange(0, WIDTH // 8)
        COUNT: tl.constexpr = (CHUNKS + 7) // 8
        at, real = token[:, None] * COUNT + block[None, :], here[:, None] & (block < COUNT)[None, :]
        factor, middle = _factors(scale, low, at, real, FIELD)
        # Relative to the largest number that there can be, so that half precision holds all.
        length = tl.maximum(tl.max(tl.abs(middle) + HALF * factor, axis=1) * (1 / HALF), 1e-30)
        inverse = (1 / length)[:, None]
        share, base = _each(factor * inverse, BLOCK, WIDTH), _each(middle * inverse, BLOCK, WIDTH)
        one, two = one * share + base, two * share + base
    return one, two, length


@triton.jit
def _factors(scale, low, at, real, FIELD: tl.constexpr):
    """Load the scales of groups, and compute what the code 2^(FIELD - 1) stands for in each."""
    factor = tl.load(scale.to(tl.pointer_type(tl.float16)) + at, mask=real, other=0.0).to(tl.float32)
    least = tl.load(low.to(tl.pointer_type(tl.float16)) + at, mask=real, other=0.0).to(tl.float32)
    return factor, least + (1 << (FIELD - 1)) * factor


@triton.jit
def scaled_queries(
    query0, query1, scale, low, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, FIELD: tl.constexpr, WORDS: tl.constexpr
):
    """Multiply the channels of queries by the scales that tokens of a key channel share.

    The queries, (ROWS, 2 WIDTH) float32, are those channels that the two tiles have. Returns both in half precision, divided by
    the largest number of a row, that number, and what is to be added to all scores of a row.
    """
    pair = tl.arange(0, 2 * WIDTH)
    real = pair < 2 * CHUNKS
    factor0, middle0 = _factors(scale, low, channels_of(pair, 0, FIELD, WORDS), real, FIELD)
    factor1, middle1 = _factors(scale, low, channels_of(pair, 1, FIELD, WORDS), real, FIELD)
    shift = tl.sum(query0 * middle0[None, :], axis=1) + tl.sum(query1 * middle1[None, :], axis=1)
    wide0, wide1 = query0 * factor0[None, :], query1 * factor1[None, :]
    most = tl.maximum(tl.max(tl.maximum(tl.abs(wide0), tl.abs(wide1)), axis=1), 1e-30)
    inverse = (1 / most)[:, None]
    return (wide0 * inverse).to(tl.float16), (wide1 * inverse).to(tl.float16), most, shift


@triton.jit
def read_vectors(
    codes,
    scale,
    low,
    here,
    table,
    moves,
    scales,
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
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Read the vectors of those tokens of a block that are `here`.

    `codes`, `scale` and `low` are the addresses of its first token, the others see `formats.code_options` and `tables.tables`.
    Returns the two tiles, (BLOCK, 2 WIDTH) float16, and the lengths that they are to be multiplied by, (BLOCK,) float32.
    """
    if LOOKUP == "blocks":
        one, two, length = _read_blocks(codes, here, CHUNKS, WIDTH, FIELD, BLOCK)
    elif LOOKUP == "groups":
        one, two, length = _read_groups(codes, scale, low, here, CHUNKS, WIDTH, BITS, ALIGN, FIELD, WORDS, KEYS, BLOCK)
    else:
        if LOOKUP == "integers" or LOOKUP == "floats" or LOOKUP == "curve":
            pairs0, pairs1 = _numbers(codes, here, CHUNKS, WIDTH, BITS, ALIGN, FIELD, WORDS, BLOCK)
            if LOOKUP == "floats":
                pairs0, pairs1 = _floats(pairs0), _floats(pairs1)
        else:
            words = read_codes(codes, here, CHUNKS, WIDTH, BITS, ALIGN, BLOCK)
            if LOOKUP == "pairs":
                first, second = _halved(words, FIELD)
                pairs0, pairs1 = tl.load(table + first), tl.load(table + second)
            elif LOOKUP == "held pairs":
                first, second = _halved(words, FIELD)
                held = tl.load(table + tl.arange(0, POINTS))
                pairs0, pairs1 = gathered(held, first, BLOCK, WIDTH), gathered(held, second, BLOCK, WIDTH)
            else:
                pairs0, pairs1 = codewords(words, table, moves, LOOKUP, MOVE_BITS, FIELD, POINTS, BLOCK, WIDTH)
        if LOOKUP == "curve":
            one, two = _curve(pairs0, table, FIELD, POINTS, BLOCK, WIDTH), _curve(pairs1, table, FIELD, POINTS, BLOCK, WIDTH)
        else:
            one, two = _tile(pairs0, BLOCK, WIDTH), _tile(pairs1, BLOCK, WIDTH)
        token = tl.arange(0, BLOCK)
        if LENGTH == "byte":
            length = tl.load(scales + tl.load(scale.to(tl.pointer_type(tl.uint8)) + token, mask=here, other=0))
        elif LENGTH == "half":
            length = tl.load(scale.to(tl.pointer_type(tl.float16)) + token, mask=here, other=0.0).to(tl.float32)
        else:
            length = tl.full((BLOCK,), 1.0, tl.float32)
    return one, two, length
