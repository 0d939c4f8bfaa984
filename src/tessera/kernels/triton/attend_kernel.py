"""Partial attention over packed keys and values on a GPU: `tessera.kernels.reference.attend` in Triton.

Flash-decoding: the tokens are split among programs, each of which goes through its share block by block with an online
softmax and leaves a partial result and its log-sum-exp; `join_kernel` joins them. A program serves all query rows (query heads
of a group, query tokens) of one key head, so a vector is decoded once for all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tessera.kernels.triton.read_kernel import channels_of, read_vectors, scaled_queries

#: Tokens of a block, see `block_table.block_of`.
BLOCK = 64
#: Number of channels of queries that are scaled at once.
SLICE = 32


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
        entries = rotation + channel[:, None] * dim + pair[None, :]
        real = (channel < dim)[:, None] & real_pair[None, :]
        one = tl.dot(wide, tl.load(entries, mask=real, other=0.0), one)
        two = tl.dot(wide, tl.load(entries + dim // 2, mask=real, other=0.0), two)
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
    shifted,  # the same rotated, less `unit`, its channels ordered, float16
    unit,  # (batch · kv_heads, rows) float32
    rotation,  # (dim, dim) float16, y = x @ rotation, its columns ordered
    blocks,  # (blocks, COLUMNS) int64, see `tessera.kernels.triton.block_table`
    table,  # table of LOOKUP
    moves,  # (2^MOVE_BITS,) int32, see `tessera.kernels.triton.tables`
    scales,  # (256,) float32, where LENGTH is byte
    v_table,  # the same three of values, where these are APART
    v_moves,
    v_scales,
    mask,  # (batch, heads, queries, tokens) uint8
    out,  # (splits, batch · kv_heads, rows, dim) float32, its channels ordered
    lse,  # (splits, batch · kv_heads, rows) float32
    mask_batch,
    mask_head,
    mask_query,
    step,  # what the numbers of keys are to be multiplied by beside their lengths
    v_step,  # and those of values
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
    FIELD: tl.constexpr,
    POINTS: tl.constexpr,
    LENGTH: tl.constexpr,
    WORDS: tl.constexpr,
    ZERO: tl.constexpr,  # the code of 0 of uniform codes
    V_BITS: tl.constexpr,  # the same nine of values
    V_ALIGN: tl.constexpr,
    V_LOOKUP: tl.constexpr,
    V_MOVE_BITS: tl.constexpr,
    V_FIELD: tl.constexpr,
    V_POINTS: tl.constexpr,
    V_LENGTH: tl.constexpr,
    V_WORDS: tl.constexpr,
    V_ZERO: tl.constexpr,
    APART: tl.constexpr,  # whether values have another format than keys; if not, its table is held once
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
    q0 = tl.load(shifted + at, mask=real, other=0.0)
    q1 = tl.load(shifted + at + dim // 2, mask=real, other=0.0)
    q_unit = tl.load(unit + line * rows + row, mask=real_row, other=1.0)
    place = start + row % q_tokens
    if CENTRED:
        channel = tl.arange(0, 4 * WIDTH)
        real_channel = channel < dim
        whole = real_row[:, None] & real_channel[None, :]
        query = tl.load(q + first_row[:, None] + channel[None, :], mask=whole, other=0.0)

    if LOOKUP == "groups":
        query0 = tl.load(q + first_row[:, None] + channels_of(pair, 0, FIELD, WORDS)[None, :], mask=real, other=0.0)
        query1 = tl.load(q + first_row[:, None] + channels_of(pair, 1, FIELD, WORDS)[None, :], mask=real, other=0.0)
    if ZERO:
        q_sum = tl.sum(q0.to(tl.float32), axis=1) + tl.sum(q1.to(tl.float32), axis=1)

    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    below = tl.zeros((ROWS,), tl.float32)  # that of the sums which is due to V_ZERO
    sum0 = tl.zeros((ROWS, 2 * WIDTH), tl.float32)
    sum1 = tl.zeros((ROWS, 2 * WIDTH), tl.float32)
    for number in range(split * per_split, tl.minimum((split + 1) * per_split, block_count)):
        # Addresses and strides in bytes; the tokens of a block follow each other.
        about = blocks + number * COLUMNS
        k_codes = tl.load(about) + line * tl.load(about + 7)
        k_scale = tl.load(about + 1) + line * tl.load(about + 8)
        k_low = tl.load(about + 2) + line * tl.load(about + 9)
        v_codes = tl.load(about + 4) + line * tl.load(about + 11)
        v_scale = tl.load(about + 5) + line * tl.load(about + 12)
        v_low = tl.load(about + 6) + line * tl.load(about + 13)
        count = tl.load(about + 14).to(tl.int32)
        first = tl.load(about + 15).to(tl.int32)
        here = token < count

        k0, k1, length = read_vectors(
            k_codes,
            k_scale,
            k_low,
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
            True,
            BLOCK,
        )
        a0, a1, a_unit = q0, q1, q_unit
        shift = tl.zeros((ROWS,), tl.float32)
        if CENTRED:
            k_centre = k_low.to(tl.pointer_type(tl.int16))
            word = tl.load(tl.multiple_of(k_centre, ALIGN) + channel, mask=real_channel, other=0)
            mean = (word & -16).to(tl.float16, bitcast=True).to(tl.float32)
            shift = tl.sum(query * mean[None, :], axis=1)
            if tl.load((tl.load(about + 3) + line * tl.load(about + 10)).to(tl.pointer_type(tl.uint8))) > 0:
                # Channels of this group were narrowed: scale the query's instead.
                a0, a1, a_unit = _widened(
                    q, rotation, k_centre, first_row, real_row, pair, real_pair, dim, ROWS, 2 * WIDTH, SLICE
                )
        if LOOKUP == "groups":
            a0, a1, a_unit, shift = scaled_queries(query0, query1, k_scale, k_low, CHUNKS, WIDTH, FIELD, WORDS)
        scores = tl.dot(a0, tl.trans(k0))
        scores = tl.dot(a1, tl.trans(k1), scores)
        if ZERO:
            scores -= (q_sum * (ZERO * 2.0**-24))[:, None]
        scores = scores * (length * step)[None, :] * a_unit[:, None] + shift[:, None]
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

        v0, v1, length = read_vectors(
            v_codes,
            v_scale,
            v_low,
            here,
            v_table,
            v_moves,
            v_scales,
            CHUNKS,
            WIDTH,
            V_BITS,
            V_ALIGN,
            V_LOOKUP,
            V_MOVE_BITS,
            V_FIELD,
            V_POINTS,
            V_LENGTH,
            V_WORDS,
            False,
            BLOCK,
        )
        longest = tl.maximum(tl.max(length, axis=0), 1e-30)  # so that the weights fit half precision
        share = (weight * (length / longest)[None, :]).to(tl.float16)
        worth = longest * v_step
        sum0 = sum0 * keep[:, None] + tl.dot(share, v0) * worth
        sum1 = sum1 * keep[:, None] + tl.dot(share, v1) * worth
        if V_ZERO:
            below = below * keep + tl.sum(share.to(tl.float32), axis=1) * worth

    whole_line = split.to(tl.int64) * lines + line
    norm = tl.where(total == 0, 1.0, total)[:, None]
    if V_ZERO:
        sum0 -= (below * (V_ZERO * 2.0**-24))[:, None]
        sum1 -= (below * (V_ZERO * 2.0**-24))[:, None]
    to = ((whole_line * rows + row) * dim)[:, None] + pair[None, :]
    tl.store(out + to, sum0 / norm, mask=real)
    tl.store(out + to + dim // 2, sum1 / norm, mask=real)
    tl.store(lse + whole_line * rows + row, top + tl.log(total), mask=real_row)
