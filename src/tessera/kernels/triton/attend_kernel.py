"""Partial attention over packed keys and values on a GPU: `tessera.kernels.reference.attend` in Triton.

Flash-decoding: the tokens are split among programs, each of which goes through its share block by block with an online
softmax and leaves a partial result and its log-sum-exp; `join_kernel` joins them. A program serves all query rows (query heads
of a group, query tokens) of one key head, so a codeword is looked up once for all of them.

A codeword's components are two pairs of half-precision numbers, each pair a word of 32 bits, as tensor cores take them. Their
integers are stored in the fractions of these numbers without an exponent (subnormal): n has the value n · 2^-24, and no
conversion is needed. All first pairs form one tile and all second pairs another, so the channels of queries and results have
the order of `tessera.kernels.triton.tables.column_order`.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Tokens of a block: at most as many as share the means of their key channels.
BLOCK = 64
#: Number of channels of queries that are scaled at once.
SLICE = 32


@triton.jit
def _codes(base, seen, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
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
    bit = chunks * BITS
    if BITS <= 17 and ALIGN % 2 == 0:
        # Two halves of a word contain a code wherever it begins. Nothing beyond the row may be read.
        half = bit >> 4
        row = tl.multiple_of(base.to(tl.pointer_type(tl.uint16)), ALIGN) + tokens[:, None] * (ROW_BYTES // 2)
        inside = seen & (half + 1 < ROW_BYTES // 2)[None, :]
        wide = tl.load(row + half[None, :], mask=seen, other=0).to(tl.int32)
        wide |= tl.load(row + (half + 1)[None, :], mask=inside, other=0).to(tl.int32) << 16
        return (wide >> (bit & 15)[None, :]) & ((1 << BITS) - 1)
    byte = bit >> 3
    row = tl.multiple_of(base.to(tl.pointer_type(tl.uint8)), ALIGN) + tokens[:, None] * ROW_BYTES
    wide = tl.load(row + byte[None, :], mask=seen, other=0).to(tl.int32)
    # A code may end in the byte in which it begins, or up to three bytes later.
    for i in tl.static_range(1, (BITS + 14) // 8):
        inside = seen & (byte + i < ROW_BYTES)[None, :]
        wide |= tl.load(row + (byte + i)[None, :], mask=inside, other=0).to(tl.int32) << (8 * i)
    return (wide >> (bit & 7)[None, :]) & ((1 << BITS) - 1)


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
    turn = (move & 1) != 0
    return _signed(tl.where(turn, _swapped(one), one), tl.where(turn, _swapped(two), two), move)


@triton.jit
def _tile(pairs, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Unpack words of pairs (BLOCK, WIDTH) to (BLOCK, 2 WIDTH) float16."""
    low = pairs.to(tl.int16).to(tl.float16, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.reshape(tl.join(low, high), (BLOCK, 2 * WIDTH))


@triton.jit
def _look_up(
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
    """Look up the first and the second pairs of the codewords, each (BLOCK, 2 WIDTH); see `tables.LOOKUPS`."""
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
        word = tl.gather(held, tl.reshape(point, (BLOCK * WIDTH,)), 0)
        move = tl.gather(held_moves, tl.reshape(number, (BLOCK * WIDTH,)), 0)
        one, two = _moved_bytes(tl.reshape(word, (BLOCK, WIDTH)), tl.reshape(move, (BLOCK, WIDTH)))
    elif FIELD == 8:
        one, two = _moved_bytes(tl.load(table + point), tl.load(moves + number))
    else:
        both = tl.load(table + point)
        one, two = _moved_pairs(both.to(tl.int32), (both >> 32).to(tl.int32), tl.load(moves + number))
    return _tile(one, BLOCK, WIDTH), _tile(two, BLOCK, WIDTH)


@triton.jit
def _widened(
    q,
    rotation,
    k_centre,
    first_row,
    real_row,
    pair,
    real_pair,
    dim: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    SLICE: tl.constexpr,
):
    """Scale the channels of queries by a group's factors, rotate, and divide by each row's largest number; return both."""
    most = tl.full((ROWS,), 1e-30, tl.float32)
    for part in range(0, dim, SLICE):
        wide = _slice(q, k_centre, part, first_row, real_row, dim, SLICE)
        most = tl.maximum(most, tl.max(tl.abs(wide), axis=1))
    one = tl.zeros((ROWS, PAIRS), tl.float32)
    two = tl.zeros((ROWS, PAIRS), tl.float32)
    for part in range(0, dim, SLICE):
        wide = (_slice(q, k_centre, part, first_row, real_row, dim, SLICE) / most[:, None]).to(tl.float16)
        channel = part + tl.arange(0, SLICE)
        turn = rotation + channel[:, None] * dim + pair[None, :]
        real = (channel < dim)[:, None] & real_pair[None, :]
        one = tl.dot(wide, tl.load(turn, mask=real, other=0.0), one)
        two = tl.dot(wide, tl.load(turn + dim // 2, mask=real, other=0.0), two)
    return one.to(tl.float16), two.to(tl.float16), most


@triton.jit
def _slice(q, k_centre, part, first_row, real_row, dim: tl.constexpr, SLICE: tl.constexpr):
    """Load some channels of the queries, multiplied by their factors."""
    channel = part + tl.arange(0, SLICE)
    real = channel < dim
    exponent = (tl.load(k_centre + channel, mask=real, other=0) & 15).to(tl.float32)
    whole = tl.load(q + first_row[:, None] + channel[None, :], mask=real_row[:, None] & real[None, :], other=0.0)
    return whole * tl.exp2(exponent)[None, :]


# Arguments that change from call to call must not cause a new compilation.
@triton.jit(do_not_specialize=["mask_batch", "mask_head", "mask_query", "start", "window", "block_count", "per_split"])
def attend_kernel(
    q,  # (batch · kv_heads, rows, dim) float32, times the scale
    turned,  # the same rotated, less `unit`, its channels ordered, float16
    unit,  # (batch · kv_heads, rows) float32
    rotation,  # (dim, dim) float16, y = x @ rotation, its columns ordered
    blocks,  # (blocks, COLUMNS) int64, see `tessera.kernels.triton.tables`
    table,  # table of LOOKUP
    moves,  # (2^MOVE_BITS,) int32, see `tessera.kernels.triton.tables`
    scales,  # (256,) float32
    v_table,  # the same three of values, where these are APART
    v_moves,
    v_scales,
    mask,  # (batch, heads, queries, tokens) uint8
    out,  # (splits, batch · kv_heads, rows, dim) float32, its channels ordered
    lse,  # (splits, batch · kv_heads, rows) float32
    mask_batch,
    mask_head,
    mask_query,
    step,  # 2^24 times that of the codebook of keys
    v_step,  # and of values
    softcap,
    start,
    window,
    block_count,
    per_split,
    lines,
    kv_heads,
    group,
    rows,
    q_tokens,
    COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,  # CHUNKS, rounded up to what a dot product takes
    ROWS: tl.constexpr,  # of a program
    BITS: tl.constexpr,
    ALIGN: tl.constexpr,  # of codes and centres, in bytes
    LOOKUP: tl.constexpr,
    MOVE_BITS: tl.constexpr,
    FIELD: tl.constexpr,  # bits of a component of a point
    POINTS: tl.constexpr,
    V_BITS: tl.constexpr,  # the same six of values
    V_ALIGN: tl.constexpr,
    V_LOOKUP: tl.constexpr,
    V_MOVE_BITS: tl.constexpr,
    V_FIELD: tl.constexpr,
    V_POINTS: tl.constexpr,
    APART: tl.constexpr,  # whether values have another codebook than keys; if not, its table is held once
    CENTRED: tl.constexpr,
    MASKED: tl.constexpr,
    PLACED: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICE: tl.constexpr,
):
    """Compute one split of one key head, for one tile of rows."""
    dim: tl.constexpr = 4 * CHUNKS
    if not APART:
        v_table, v_moves, v_scales, v_step = table, moves, scales, step
    line = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    pair = tl.arange(0, 2 * WIDTH)
    token = tl.arange(0, BLOCK)
    real_row = row < rows
    real_pair = pair < 2 * CHUNKS
    real = real_row[:, None] & real_pair[None, :]
    first_row = (line * rows + row) * dim
    at = first_row[:, None] + pair[None, :]
    q0 = tl.load(turned + at, mask=real, other=0.0)
    q1 = tl.load(turned + at + dim // 2, mask=real, other=0.0)
    q_unit = tl.load(unit + line * rows + row, mask=real_row, other=1.0)
    place = start + row % q_tokens
    if CENTRED:
        channel = tl.arange(0, 4 * WIDTH)
        real_channel = channel < dim
        whole = real_row[:, None] & real_channel[None, :]
        query = tl.load(q + first_row[:, None] + channel[None, :], mask=whole, other=0.0)

    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sum0 = tl.zeros((ROWS, 2 * WIDTH), tl.float32)
    sum1 = tl.zeros((ROWS, 2 * WIDTH), tl.float32)
    for number in range(split * per_split, tl.minimum((split + 1) * per_split, block_count)):
        # Addresses and strides in bytes; the tokens of a block follow each other.
        about = blocks + number * COLUMNS
        k_codes = tl.load(about) + line * tl.load(about + 6)
        k_scale = (tl.load(about + 1) + line * tl.load(about + 7)).to(tl.pointer_type(tl.uint8))
        v_codes = tl.load(about + 4) + line * tl.load(about + 10)
        v_scale = (tl.load(about + 5) + line * tl.load(about + 11)).to(tl.pointer_type(tl.uint8))
        count = tl.load(about + 12)
        first = tl.load(about + 13)
        here = token < count

        codes = _codes(k_codes, here, CHUNKS, WIDTH, BITS, ALIGN, BLOCK)
        k0, k1 = _look_up(codes, table, moves, LOOKUP, MOVE_BITS, FIELD, POINTS, BLOCK, WIDTH)
        a0, a1, a_unit = q0, q1, q_unit
        shift = tl.zeros((ROWS,), tl.float32)
        if CENTRED:
            k_centre = (tl.load(about + 2) + line * tl.load(about + 8)).to(tl.pointer_type(tl.int16))
            word = tl.load(tl.multiple_of(k_centre, ALIGN) + channel, mask=real_channel, other=0)
            mean = (word & -16).to(tl.float16, bitcast=True).to(tl.float32)
            shift = tl.sum(query * mean[None, :], axis=1)
            if tl.load((tl.load(about + 3) + line * tl.load(about + 9)).to(tl.pointer_type(tl.uint8))) > 0:
                # Channels of this group were narrowed: scale the query's instead.
                a0, a1, a_unit = _widened(
                    q, rotation, k_centre, first_row, real_row, pair, real_pair, dim, ROWS, 2 * WIDTH, SLICE
                )
        scores = tl.dot(a0, tl.trans(k0))
        scores = tl.dot(a1, tl.trans(k1), scores)
        length = tl.load(scales + tl.load(k_scale + token, mask=here, other=0)) * step
        scores = scores * length[None, :] * a_unit[:, None] + shift[:, None]
        if CAPPED:
            # tanh, which the Triton language lacks
            t = scores / softcap
            e = tl.exp(-2 * tl.abs(t))
            scores = softcap * tl.where(t < 0, -1.0, 1.0) * (1 - e) / (1 + e)
        visible = real_row[:, None] & here[None, :]
        if PLACED:
            visible &= (first + token)[None, :] <= place[:, None]
        if WINDOWED:
            visible &= (first + token)[None, :] > (place - window)[:, None]
        if MASKED:
            head = line % kv_heads * group + row // q_tokens
            by_row = line // kv_heads * mask_batch + head.to(tl.int64) * mask_head + (row % q_tokens).to(tl.int64) * mask_query
            visible &= tl.load(mask + by_row[:, None] + (first + token)[None, :], mask=visible, other=0) != 0
        scores = tl.where(visible, scores, -float("inf"))

        new = tl.maximum(top, tl.max(scores, axis=1))
        base = tl.where(new == -float("inf"), 0.0, new)
        weight = tl.exp(scores - base[:, None])
        keep = tl.exp(top - base)
        total = total * keep + tl.sum(weight, axis=1)
        top = new

        codes = _codes(v_codes, here, CHUNKS, WIDTH, V_BITS, V_ALIGN, BLOCK)
        v0, v1 = _look_up(codes, v_table, v_moves, V_LOOKUP, V_MOVE_BITS, V_FIELD, V_POINTS, BLOCK, WIDTH)
        length = tl.load(v_scales + tl.load(v_scale + token, mask=here, other=0))
        longest = tl.maximum(tl.max(length, axis=0), 1e-30)  # so that the weights fit half precision
        share = (weight * (length / longest)[None, :]).to(tl.float16)
        worth = longest * v_step
        sum0 = sum0 * keep[:, None] + tl.dot(share, v0) * worth
        sum1 = sum1 * keep[:, None] + tl.dot(share, v1) * worth

    whole_line = split.to(tl.int64) * lines + line
    norm = tl.where(total == 0, 1.0, total)[:, None]
    to = ((whole_line * rows + row) * dim)[:, None] + pair[None, :]
    tl.store(out + to, sum0 / norm, mask=real)
    tl.store(out + to + dim // 2, sum1 / norm, mask=real)
    tl.store(lse + whole_line * rows + row, top + tl.log(total), mask=real_row)
