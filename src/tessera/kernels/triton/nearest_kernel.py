"""Nearest codeword of a product codebook on a GPU: `tessera.kernels.nearest`, which explains the search, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

#: Chunks of a program.
BLOCK = 128
#: Chunks of a program that searches in full, and codewords that it compares with at a time.
FEW, TILE = 32, 128


@triton.jit
def nearest_kernel(
    x,  # (n, 4) float32
    roots,  # (cubes,) int32
    children,  # (n, 16) int32
    first,  # offset of each list in `points`
    count,  # length of each list, int32
    points,  # (entries, 5) float32: components of the candidates and half their squared lengths
    codes,  # (entries,) int32: product numbers
    units,  # (24, 4) float32
    product,  # (24, 24) int32, of two units
    inverse,  # (24,) int32
    reduction_unit,
    rotation_unit,
    unit_rotation,  # see `reduction_tables`, int32
    out,  # (n,) int32; -1 where all codewords must be compared
    n,
    root,
    square_radius,
    origin0,
    origin1,
    origin2,
    origin3,
    dims0,
    dims1,
    dims2,
    dims3,
    DEPTH: tl.constexpr,
    CONJUGATIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Search one block of chunks."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < n
    x0 = tl.load(x + 4 * at, mask=live, other=0.0)
    x1 = tl.load(x + 4 * at + 1, mask=live, other=0.0)
    x2 = tl.load(x + 4 * at + 2, mask=live, other=0.0)
    x3 = tl.load(x + 4 * at + 3, mask=live, other=0.0)

    # Nearest unit, in closed form: the axis of the largest component, or the signs of all.
    most, axis, negative = tl.abs(x0), tl.zeros_like(at), x0 < 0
    larger = tl.abs(x1) > most
    most, axis, negative = tl.where(larger, tl.abs(x1), most), tl.where(larger, 1, axis), tl.where(larger, x1 < 0, negative)
    larger = tl.abs(x2) > most
    most, axis, negative = tl.where(larger, tl.abs(x2), most), tl.where(larger, 2, axis), tl.where(larger, x2 < 0, negative)
    larger = tl.abs(x3) > most
    most, axis, negative = tl.where(larger, tl.abs(x3), most), tl.where(larger, 3, axis), tl.where(larger, x3 < 0, negative)
    total = tl.abs(x0) + tl.abs(x1) + tl.abs(x2) + tl.abs(x3)
    signs = 8 * (x0 < 0).to(tl.int32) + 4 * (x1 < 0).to(tl.int32) + 2 * (x2 < 0).to(tl.int32) + (x3 < 0).to(tl.int32)
    unit = tl.where(total * 0.5 > most, 8 + signs, 2 * axis + negative.to(tl.int32))
    p0, p1 = tl.load(units + 4 * unit), tl.load(units + 4 * unit + 1)
    p2, p3 = tl.load(units + 4 * unit + 2), tl.load(units + 4 * unit + 3)
    z0 = p0 * x0 + p1 * x1 + p2 * x2 + p3 * x3
    z1 = p0 * x1 - p1 * x0 - p2 * x3 + p3 * x2
    z2 = p0 * x2 + p1 * x3 - p2 * x0 - p3 * x1
    z3 = p0 * x3 - p1 * x2 + p2 * x1 - p3 * x0

    reduction = tl.zeros_like(at)
    if CONJUGATIONS:
        # The largest of the three comes first, then the flip of two signs that fixes the first two.
        shift = tl.where(tl.abs(z2) > tl.abs(z1), 1, 0)
        shift = tl.where(tl.abs(z3) > tl.maximum(tl.abs(z1), tl.abs(z2)), 2, shift)
        a = tl.where(shift == 0, z1, tl.where(shift == 1, z2, z3))
        b = tl.where(shift == 0, z2, tl.where(shift == 1, z3, z1))
        c = tl.where(shift == 0, z3, tl.where(shift == 1, z1, z2))
        flips = tl.where(a < 0, tl.where(b < 0, 3, 2), tl.where(b < 0, 1, 0))
        z1 = tl.where(flips >= 2, -a, a)
        z2 = tl.where((flips == 1) | (flips == 3), -b, b)
        z3 = tl.where((flips == 1) | (flips == 2), -c, c)
        reduction = shift * 4 + flips

    # Descend the tree of cubes.
    y0, y1, y2, y3 = z0 / root, z1 / root, z2 / root, z3 / root
    c0 = tl.minimum(tl.maximum(tl.floor(y0), origin0), origin0 + dims0 - 1)
    c1 = tl.minimum(tl.maximum(tl.floor(y1), origin1), origin1 + dims1 - 1)
    c2 = tl.minimum(tl.maximum(tl.floor(y2), origin2), origin2 + dims2 - 1)
    c3 = tl.minimum(tl.maximum(tl.floor(y3), origin3), origin3 + dims3 - 1)
    cube = (c0 - origin0).to(tl.int32) * dims1 + (c1 - origin1).to(tl.int32)
    cube = (cube * dims2 + (c2 - origin2).to(tl.int32)) * dims3 + (c3 - origin3).to(tl.int32)
    y0, y1 = tl.minimum(tl.maximum(y0 - c0, 0.0), 1.0), tl.minimum(tl.maximum(y1 - c1, 0.0), 1.0)
    y2, y3 = tl.minimum(tl.maximum(y2 - c2, 0.0), 1.0), tl.minimum(tl.maximum(y3 - c3, 0.0), 1.0)
    node = tl.load(roots + cube)
    for _ in tl.static_range(DEPTH):
        h0, h1, h2, h3 = y0 >= 0.5, y1 >= 0.5, y2 >= 0.5, y3 >= 0.5
        part = 8 * h0.to(tl.int32) + 4 * h1.to(tl.int32) + 2 * h2.to(tl.int32) + h3.to(tl.int32)
        inner = node < -1
        node = tl.load(children + tl.where(inner, -2 - node, 0) * 16 + part, mask=inner, other=0) + tl.where(inner, 0, node)
        y0, y1 = 2 * y0 - h0.to(tl.float32), 2 * y1 - h1.to(tl.float32)
        y2, y3 = 2 * y2 - h2.to(tl.float32), 2 * y3 - h3.to(tl.float32)

    far = (node < 0) | (z0 * z0 + z1 * z1 + z2 * z2 + z3 * z3 > square_radius)
    row = tl.where(far, 0, node)
    begin, length = tl.load(first + row), tl.load(count + row)
    best = tl.full((BLOCK,), -3.4e38, tl.float32)
    where = begin
    for i in range(tl.max(length, 0)):
        inside = i < length
        entry = tl.where(inside, begin + i, begin)
        score = tl.load(points + 5 * entry) * z0 + tl.load(points + 5 * entry + 1) * z1
        score += tl.load(points + 5 * entry + 2) * z2 + tl.load(points + 5 * entry + 3) * z3
        score -= tl.load(points + 5 * entry + 4)
        better = inside & (score > best)
        best, where = tl.where(better, score, best), tl.where(better, entry, where)
    found = tl.load(codes + where)
    s, right = found // 24, found % 24
    if CONJUGATIONS:
        # x = q_p·g·z·ḡ, so the codeword for x is q_p·(g·q_unit·ḡ)·(g·s·ḡ).
        g = tl.load(reduction_unit + reduction)
        right = tl.load(product + 24 * tl.load(product + 24 * g + right) + tl.load(inverse + g))
        rotated = tl.load(product + 24 * g + tl.load(rotation_unit + s % 12))
        s = s // 12 * 12 + tl.load(unit_rotation + rotated)
    code = s * 24 + tl.load(product + 24 * unit + right)
    tl.store(out + at, tl.where(far, -1, code), mask=live)


@triton.jit
def full_search_kernel(
    x,  # (n, 4) float32
    words,  # (m, 4) float32, all codewords
    bias,  # (m,) float32, half their squared lengths
    out,  # (n,) int32; where it is -1 the code is found
    n,
    m,
    FEW: tl.constexpr,
    TILE: tl.constexpr,
):
    """Search in full for the chunks of one block that `nearest_kernel` left; most blocks have none."""
    at = tl.program_id(0) * FEW + tl.arange(0, FEW)
    left = tl.load(out + at, mask=at < n, other=0) < 0
    if tl.max(left.to(tl.int32), 0) > 0:
        x0 = tl.load(x + 4 * at, mask=left, other=0.0)
        x1 = tl.load(x + 4 * at + 1, mask=left, other=0.0)
        x2 = tl.load(x + 4 * at + 2, mask=left, other=0.0)
        x3 = tl.load(x + 4 * at + 3, mask=left, other=0.0)
        best, code = tl.full((FEW,), -float("inf"), tl.float32), tl.zeros((FEW,), tl.int32)
        for start in range(0, m, TILE):
            word = start + tl.arange(0, TILE)
            inside = word < m
            score = x0[:, None] * tl.load(words + 4 * word, mask=inside, other=0.0)[None, :]
            score += x1[:, None] * tl.load(words + 4 * word + 1, mask=inside, other=0.0)[None, :]
            score += x2[:, None] * tl.load(words + 4 * word + 2, mask=inside, other=0.0)[None, :]
            score += x3[:, None] * tl.load(words + 4 * word + 3, mask=inside, other=0.0)[None, :]
            score -= tl.load(bias + word, mask=inside, other=float("inf"))[None, :]
            top = tl.max(score, 1)
            better = top > best
            best, code = tl.where(better, top, best), tl.where(better, start + tl.argmax(score, 1), code)
        tl.store(out + at, code, mask=left)
