"""Partial attention over packed keys and values on a GPU: `tessera.kernels.reference.attend` in Triton.

Flash-decoding: the tokens are split among programs, each of which goes through its share block by block with an online
softmax and leaves a partial result and its log-sum-exp; `merge` of the reference joins them. A program serves all query
rows (query heads of a group, query tokens) of one key head, so a codeword is looked up once for all of them.

A codeword's four components are kept in four tiles instead of being interleaved: component j of chunk c meets number
4 c + j of the query.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Tokens of a block: never more than share the means of their key channels.
BLOCK = 64


@triton.jit
def _codes(base, tokens, chunks, row_bytes, seen, BITS: tl.constexpr):
    """Codes (tokens, chunks) of packed rows that begin at `base`."""
    if BITS == 16:
        place = (base + tokens[:, None] * row_bytes).to(tl.pointer_type(tl.uint16)) + chunks[None, :]
        return tl.load(place, mask=seen, other=0).to(tl.int32)
    bit = chunks * BITS
    byte = bit >> 3
    row = base + tokens[:, None] * row_bytes
    wide = tl.load(row + byte[None, :], mask=seen, other=0).to(tl.int32)
    # A code may end in the byte it begins in, or up to three later; beyond the row nothing may be read.
    for i in tl.static_range(1, (BITS + 14) // 8):
        inside = seen & (byte + i < row_bytes)[None, :]
        wide |= tl.load(row + (byte + i)[None, :], mask=inside, other=0).to(tl.int32) << (8 * i)
    return (wide >> (bit & 7)[None, :]) & ((1 << BITS) - 1)


@triton.jit
def _component(word, control, negate, j: tl.constexpr, FIELD: tl.constexpr):
    """Component j, moved: fields of FIELD bits of `word`."""
    shift = ((control >> (8 * j)) & 255) * FIELD
    half: tl.constexpr = 1 << (FIELD - 1)
    value = (((word >> shift) & (2 * half - 1)) ^ half).to(tl.int32) - half
    return tl.where(((negate >> (8 * j)) & 1) != 0, -value, value).to(tl.float16)


@triton.jit
def _half(pairs, j: tl.constexpr):
    """The half-precision number in the lower or upper half of words of 32 bits."""
    return ((pairs >> (16 * j)) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _look_up(codes, table, table_control, table_negate, LOOKUP: tl.constexpr, MOVE_BITS: tl.constexpr, FIELD: tl.constexpr):
    """The four components of each codeword, float16, of the shape of `codes`; by `LOOKUPS` of `tessera.kernels.triton`."""
    if LOOKUP == "halves":
        low = tl.load(table + 2 * codes)
        high = tl.load(table + 2 * codes + 1)
        return _half(low, 0), _half(low, 1), _half(high, 0), _half(high, 1)
    if LOOKUP == "words":
        word = tl.load(table + codes)
        none = tl.zeros_like(codes)
        control = none + 0x03020100
        return (
            _component(word, control, none, 0, FIELD),
            _component(word, control, none, 1, FIELD),
            _component(word, control, none, 2, FIELD),
            _component(word, control, none, 3, FIELD),
        )
    word = tl.load(table + (codes >> MOVE_BITS))
    move = codes & ((1 << MOVE_BITS) - 1)
    control = tl.load(table_control + move)
    negate = tl.load(table_negate + move)
    return (
        _component(word, control, negate, 0, FIELD),
        _component(word, control, negate, 1, FIELD),
        _component(word, control, negate, 2, FIELD),
        _component(word, control, negate, 3, FIELD),
    )


@triton.jit
def attend_kernel(
    q,  # (batch · kv_heads, rows, dim) float32, times the scale
    turned,  # the same rotated, less `unit`, float16
    unit,  # (batch · kv_heads, rows) float32
    rotation,  # (dim, dim) float32, y = x @ rotation
    blocks,  # (blocks, 12) int64, see `tessera.kernels.triton`
    table,  # what LOOKUP looks up
    table_control,
    table_negate,  # (moves,) int32
    scales,  # (256,) float32
    mask,  # (batch, heads, queries, tokens) uint8
    out,  # (splits, batch · kv_heads, rows, dim) float32
    lse,  # (splits, batch · kv_heads, rows) float32
    mask_batch,
    mask_head,
    mask_query,
    step,
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
    row_bytes,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,  # CHUNKS, rounded up to what a dot product takes
    ROWS: tl.constexpr,  # of a program
    BITS: tl.constexpr,
    LOOKUP: tl.constexpr,
    MOVE_BITS: tl.constexpr,
    FIELD: tl.constexpr,  # bits of a component in `table`, but with "halves"
    CENTRED: tl.constexpr,
    ROTATED: tl.constexpr,
    MASKED: tl.constexpr,
    PLACED: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One split of one key head, for one tile of rows."""
    dim: tl.constexpr = 4 * CHUNKS
    line = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    chunk = tl.arange(0, WIDTH)
    channel = tl.arange(0, 4 * WIDTH)
    token = tl.arange(0, BLOCK)
    real_row = row < rows
    real_chunk = chunk < CHUNKS
    real = real_row[:, None] & real_chunk[None, :]
    at = (line * rows + row)[:, None] * dim + 4 * chunk[None, :]
    # Component j of every chunk of the rows.
    q0 = tl.load(turned + at, mask=real, other=0.0)
    q1 = tl.load(turned + at + 1, mask=real, other=0.0)
    q2 = tl.load(turned + at + 2, mask=real, other=0.0)
    q3 = tl.load(turned + at + 3, mask=real, other=0.0)
    q_unit = tl.load(unit + line * rows + row, mask=real_row, other=0.0)
    place = start + row % q_tokens
    if CENTRED:
        real_channel = channel < dim
        whole = (line * rows + row)[:, None] * dim + channel[None, :]
        query = tl.load(q + whole, mask=real_row[:, None] & real_channel[None, :], other=0.0)

    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sum0 = tl.zeros((ROWS, WIDTH), tl.float32)
    sum1 = tl.zeros((ROWS, WIDTH), tl.float32)
    sum2 = tl.zeros((ROWS, WIDTH), tl.float32)
    sum3 = tl.zeros((ROWS, WIDTH), tl.float32)
    for number in range(split * per_split, tl.minimum((split + 1) * per_split, block_count)):
        # Addresses and strides in bytes; the tokens of a block follow each other.
        about = blocks + number * 12
        k_codes = (tl.load(about) + line * tl.load(about + 5)).to(tl.pointer_type(tl.uint8))
        k_scale = (tl.load(about + 1) + line * tl.load(about + 6)).to(tl.pointer_type(tl.uint8))
        v_codes = (tl.load(about + 3) + line * tl.load(about + 8)).to(tl.pointer_type(tl.uint8))
        v_scale = (tl.load(about + 4) + line * tl.load(about + 9)).to(tl.pointer_type(tl.uint8))
        count = tl.load(about + 10)
        first = tl.load(about + 11)
        here = token < count
        seen = here[:, None] & real_chunk[None, :]

        codes = _codes(k_codes, token, chunk, row_bytes, seen, BITS)
        k0, k1, k2, k3 = _look_up(codes, table, table_control, table_negate, LOOKUP, MOVE_BITS, FIELD)
        a0, a1, a2, a3, a_unit = q0, q1, q2, q3, q_unit
        shift = tl.zeros((ROWS,), tl.float32)
        if CENTRED:
            k_centre = (tl.load(about + 2) + line * tl.load(about + 7)).to(tl.pointer_type(tl.int16))
            word = tl.load(k_centre + channel, mask=real_channel, other=0)
            mean = (word & -16).to(tl.float16, bitcast=True).to(tl.float32)
            exponent = (word & 15).to(tl.float32)
            shift = tl.sum(query * mean[None, :], axis=1)
            if tl.max(exponent, axis=0) > 0:
                # Channels of this group were narrowed: widen the query's instead.
                wide = query * tl.exp2(exponent)[None, :]
                if ROTATED:
                    turn = rotation + channel[:, None] * dim + 4 * chunk[None, :]
                    part = real_channel[:, None] & real_chunk[None, :]
                    w0 = tl.dot(wide, tl.load(turn, mask=part, other=0.0), input_precision="ieee")
                    w1 = tl.dot(wide, tl.load(turn + 1, mask=part, other=0.0), input_precision="ieee")
                    w2 = tl.dot(wide, tl.load(turn + 2, mask=part, other=0.0), input_precision="ieee")
                    w3 = tl.dot(wide, tl.load(turn + 3, mask=part, other=0.0), input_precision="ieee")
                else:
                    factor = k_centre + 4 * chunk
                    e0 = (tl.load(factor, mask=real_chunk, other=0) & 15).to(tl.float32)
                    e1 = (tl.load(factor + 1, mask=real_chunk, other=0) & 15).to(tl.float32)
                    e2 = (tl.load(factor + 2, mask=real_chunk, other=0) & 15).to(tl.float32)
                    e3 = (tl.load(factor + 3, mask=real_chunk, other=0) & 15).to(tl.float32)
                    w0 = tl.load(q + at, mask=real, other=0.0) * tl.exp2(e0)[None, :]
                    w1 = tl.load(q + at + 1, mask=real, other=0.0) * tl.exp2(e1)[None, :]
                    w2 = tl.load(q + at + 2, mask=real, other=0.0) * tl.exp2(e2)[None, :]
                    w3 = tl.load(q + at + 3, mask=real, other=0.0) * tl.exp2(e3)[None, :]
                most = tl.maximum(tl.maximum(tl.abs(w0), tl.abs(w1)), tl.maximum(tl.abs(w2), tl.abs(w3)))
                a_unit = tl.maximum(tl.max(most, axis=1), 1e-30)
                a0 = (w0 / a_unit[:, None]).to(tl.float16)
                a1 = (w1 / a_unit[:, None]).to(tl.float16)
                a2 = (w2 / a_unit[:, None]).to(tl.float16)
                a3 = (w3 / a_unit[:, None]).to(tl.float16)
        scores = tl.dot(a0, tl.trans(k0))
        scores = tl.dot(a1, tl.trans(k1), scores)
        scores = tl.dot(a2, tl.trans(k2), scores)
        scores = tl.dot(a3, tl.trans(k3), scores)
        length = tl.load(scales + tl.load(k_scale + token, mask=here, other=0)) * step
        scores = scores * length[None, :] * a_unit[:, None] + shift[:, None]
        if CAPPED:
            # tanh, which the language lacks
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
            by_row = line // kv_heads * mask_batch + head * mask_head + row % q_tokens * mask_query
            visible &= tl.load(mask + by_row[:, None] + (first + token)[None, :], mask=visible, other=0) != 0
        scores = tl.where(visible, scores, -float("inf"))

        new = tl.maximum(top, tl.max(scores, axis=1))
        base = tl.where(new == -float("inf"), 0.0, new)
        weight = tl.exp(scores - base[:, None])
        keep = tl.exp(top - base)
        total = total * keep + tl.sum(weight, axis=1)
        top = new

        codes = _codes(v_codes, token, chunk, row_bytes, seen, BITS)
        v0, v1, v2, v3 = _look_up(codes, table, table_control, table_negate, LOOKUP, MOVE_BITS, FIELD)
        length = tl.load(scales + tl.load(v_scale + token, mask=here, other=0))
        longest = tl.maximum(tl.max(length, axis=0), 1e-30)  # so that half precision holds the weights
        share = (weight * (length / longest)[None, :]).to(tl.float16)
        worth = longest * step
        sum0 = sum0 * keep[:, None] + tl.dot(share, v0) * worth
        sum1 = sum1 * keep[:, None] + tl.dot(share, v1) * worth
        sum2 = sum2 * keep[:, None] + tl.dot(share, v2) * worth
        sum3 = sum3 * keep[:, None] + tl.dot(share, v3) * worth

    whole_line = split.to(tl.int64) * lines + line
    norm = tl.where(total == 0, 1.0, total)[:, None]
    to = (whole_line * rows + row)[:, None] * dim + 4 * chunk[None, :]
    tl.store(out + to, sum0 / norm, mask=real)
    tl.store(out + to + 1, sum1 / norm, mask=real)
    tl.store(out + to + 2, sum2 / norm, mask=real)
    tl.store(out + to + 3, sum3 / norm, mask=real)
    tl.store(lse + whole_line * rows + row, top + tl.log(total), mask=real_row)
