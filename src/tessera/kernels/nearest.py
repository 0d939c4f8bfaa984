"""Nearest codeword of a product codebook q_p·q_s, exact, in nearly constant time.

The codebook is closed under left multiplication by the 24 units, so a chunk x may be rotated by a unit first: it is brought to
the region where its nearest unit is +1, |x1| + |x2| + |x3| <= x0, in closed form. If the codebook is closed under the
rotations s -> u·s·ū too, the vector part is brought to x1 >= x2 >= 0, x1 >= |x3| as well, which leaves 1/288 of space.
That region is cut into cubes, and each cube keeps the codewords that are nearest for any of its points; the search compares
only these. Cubes are halved until their lists are short, and codewords that cannot be nearest in a cube are dropped from its
list.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from tessera.kernels.precision import without_autocast
from tessera.quaternion import UNITS, conjugate, group_table, hamilton, nearest_unit, units

#: Cubes are inflated by this much (of a unit root mean square) in every comparison, far above float32 rounding.
MARGIN = 1e-4
#: Number of chunks searched at once, which bounds the memory of a call.
BATCH = 1 << 15
#: Edge of the largest cubes, longest list that is not divided further, and edge of the smallest cubes.
ROOT, LIST, SMALLEST = 1.0, 12, 1 / 32
#: Longest list kept. Around the origin all 288 codewords of the smallest secondary are about equally near; the few chunks there
#: are compared with all codewords.
LONGEST = 32


def canonical_rotation(v: Tensor) -> tuple[Tensor, Tensor]:
    """Bring a 3-vector to v1 >= v2 >= 0, v1 >= |v3| by a rotation of the tetrahedral group.

    Args:
        v: (n, 3).

    Returns:
        The rotated vector (n, 3), and two numbers per vector: cyclic shift (how many places to the left, 0..2) and flips
        (0: none, 1: last two signs, 2: first and last, 3: first two), applied after the shift; as (n,) int64 each.
    """
    shift = v.abs().argmax(-1)
    places = (torch.arange(3, device=v.device) + shift[:, None]) % 3
    v = v.gather(-1, places)
    negative = v[:, :2] < 0
    # Signs of (v1, v2) to fix -> the even flip that fixes them: (-,-) first two, (-,+) first and last, (+,-) last two.
    flips = torch.where(negative[:, 0], torch.where(negative[:, 1], 3, 2), negative[:, 1].long())
    signs = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=v.dtype, device=v.device)
    return v * signs[flips], shift * 4 + flips


@cache
def _rotation_units() -> Tensor:
    """Find, for each of the twelve outcomes of `canonical_rotation`, a unit g with rotated = ḡ·v·g: (12,) int64."""
    probe = torch.tensor([0.0, 0.3, 0.5, 0.7], dtype=torch.float32)
    table = []
    signs = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float32)
    all_units = units()
    conjugated = hamilton(hamilton(conjugate(all_units), probe), all_units)
    for shift in range(3):
        for flips in range(4):
            wanted = probe[1:].roll(-shift) * signs[flips]
            table.append(int((conjugated[:, 1:] - wanted).abs().amax(-1).argmin()))
    return torch.tensor(table)


@dataclass(frozen=True, eq=False)
class CellIndex:
    """Candidate lists over a tree of cubes that covers the reduced region. See `build_index`.

    A *node* is the row of a candidate list, or -2 - i for the cube whose parts are ``children[i]``, or -1 for no cube.

    Attributes:
        dims: (4,) int64, cubes of edge `ROOT` along each axis.
        origin: (4,) int64, cube coordinates of the first of them.
        roots: (prod(dims),) int32, their nodes.
        children: (n, 16) int32, nodes of the sixteen halves, the first axis slowest.
        depth: halvings at the most.
        candidates: (rows, K) int32, indices into `points`, padded by repeating the first.
        points: (m, 4) float32, the codewords that occur in any list.
        bias: (m,) float32, half their squared lengths.
        codes: (m,) int64, their codes.
        radius: chunks longer than this are searched in full.
        conjugations: whether the region is reduced by the rotations as well.
        words: (24 S, 4) float32, all codewords in the order of their codes.
    """

    dims: Tensor
    origin: Tensor
    roots: Tensor
    children: Tensor
    depth: int
    candidates: Tensor
    points: Tensor
    bias: Tensor
    codes: Tensor
    radius: float
    conjugations: bool
    words: Tensor

    def to(self, device: torch.device) -> CellIndex:
        """Return a copy on another device."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def lists(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the candidate lists without padding, concatenated, as kernels read them.

        Returns:
            first, count: (rows,) int32, the offset and the length of each list.
            points: (entries, 5) float32, the components of each candidate and its bias.
            codes: (entries,) int32, their codes.
        """
        # Lists were padded by repeating their first entry.
        length = 1 + (self.candidates[:, 1:] != self.candidates[:, :1]).sum(1)
        inside = torch.arange(self.candidates.shape[1], device=length.device) < length[:, None]
        rows = self.candidates[inside].long()
        points = torch.cat((self.points, self.bias[:, None]), dim=1)[rows]
        return (length.cumsum(0) - length).int(), length.int(), points, self.codes[rows].int()


@dataclass(frozen=True, eq=False)
class Codewords:
    """A codebook in the form that the search for the nearest codeword takes.

    Attributes:
        products: (24 S, 4) int16, row s · 24 + p is q_p·q_s in units of `step`.
        step: what one integer is worth.
        conjugations: whether the codebook is closed under s -> u·s·ū; then s = base · 12 + rotation.
        codes: (24 S,) int64, the code of each product: the number of its orbit's representative times the number of signed
            permutations, 32 with conjugations and else 8, plus that of one; within a base both are the same for all bases.
    """

    products: Tensor
    step: float
    conjugations: bool
    codes: Tensor

    @cached_property
    def index(self) -> CellIndex:
        """The index for the searches in PyTorch and Triton; the C++ search has its own."""
        return build_index(self.products.float() * self.step, self.conjugations)

    @cached_property
    def _on(self) -> dict[torch.device, CellIndex]:
        return {}

    def index_on(self, device: torch.device) -> CellIndex:
        """`index` on a device."""
        if device not in self._on:
            self._on[device] = self.index.to(device)
        return self._on[device]

    @cached_property
    def _codes(self) -> dict[torch.device, Tensor]:
        return {}

    def codes_on(self, device: torch.device) -> Tensor:
        """`codes` on a device, brought there once."""
        if device not in self._codes:
            self._codes[device] = self.codes.to(device)
        return self._codes[device]


@without_autocast
def build_index(words: Tensor, conjugations: bool) -> CellIndex:
    """Index a codebook.

    Args:
        words: (24 S, 4), row s · 24 + p is q_p·q_s; with `conjugations`, s = base · 12 + rotation.
        conjugations: whether the codebook is closed under s -> u·s·ū.
    """
    words = words.float()
    radius = float(words.norm(dim=-1).max()) * 1.05
    reach = int(radius // ROOT) + 1
    axis, signed = torch.arange(0, reach), torch.arange(-reach, reach)
    corner = torch.cartesian_prod(*((axis, axis, axis, signed) if conjugations else (axis, signed, signed, signed)))
    corner = corner[_touches(corner.float() * ROOT, ROOT, radius, conjugations)]
    low, size = corner.float() * ROOT, ROOT
    box, word = _prune_far(low, words)

    rows: list[tuple[Tensor, Tensor]] = []  # at each depth: number of the list among all lists, word
    children: list[Tensor] = []
    lists = internals = depth = 0
    roots = torch.full((0,), -1)
    parent = torch.arange(len(low))  # position of each cube in `nodes` of the depth above
    nodes = torch.full((len(low),), -1)
    while True:
        box, word = _prune(low, size, box, word, words)
        count = torch.bincount(box, minlength=len(low))
        split = (count > LIST) & (size > SMALLEST)
        leaf = ~split & (count <= LONGEST)
        nodes[parent[split]] = -2 - internals - torch.arange(int(split.sum()))
        nodes[parent[leaf]] = lists + torch.arange(int(leaf.sum()))
        if depth == 0:
            roots = nodes
        else:
            children.append(nodes)
        kept = leaf[box]
        rows.append(((lists + leaf.cumsum(0) - 1)[box[kept]], word[kept]))
        lists, internals = lists + int(leaf.sum()), internals + int(split.sum())
        if not split.any():
            break
        inner = torch.where(split, split.cumsum(0) - 1, -1)[box]
        box, word = inner[inner >= 0], word[inner >= 0]
        low, parent, box, word, size = _halve(low[split], box, word, size, radius, conjugations)
        nodes = torch.full((16 * int(split.sum()),), -1)
        depth += 1

    used, local = torch.unique(torch.cat([w for _, w in rows]), return_inverse=True)
    row = torch.cat([r for r, _ in rows])
    row, order = row.sort(stable=True)
    local = local[order]
    count = torch.bincount(row, minlength=lists)
    first = count.cumsum(0) - count
    candidates = local[first][:, None].repeat(1, int(count.max())).int()
    candidates[row, torch.arange(len(row)) - first[row]] = local.int()

    origin = corner.amin(0)
    dims = corner.amax(0) - origin + 1
    grid = torch.full((int(dims.prod()),), -1, dtype=torch.int32)
    grid[_flat(corner - origin, dims)] = roots.int()
    tree = torch.cat(children).view(-1, 16).int() if children else torch.zeros(0, 16, dtype=torch.int32)
    points = words[used]
    bias = points.square().sum(-1) / 2
    return CellIndex(dims, origin, grid, tree, depth, candidates, points, bias, used, radius, conjugations, words)


def _touches(low: Tensor, size: float, radius: float, conjugations: bool) -> Tensor:
    """Find the cubes that may intersect the reduced region (a few that do not are kept): (n,) bool."""
    low, high = low - MARGIN, low + size + MARGIN
    least = torch.where((low < 0) & (high > 0), 0.0, torch.minimum(low.abs(), high.abs()))
    keep = (least[:, 1:].sum(-1) <= high[:, 0]) & (least.norm(dim=-1) <= radius)
    if conjugations:
        keep &= (high[:, 1] >= low[:, 2]) & (high[:, 2] >= 0) & (high[:, 1] >= least[:, 3])
    return keep


def _halve(
    low: Tensor, box: Tensor, word: Tensor, size: float, radius: float, conjugations: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Cut every cube into sixteen, each with its parent's list: (low, place among all parts, box, word, size)."""
    size /= 2
    corners = _corners(size)
    parts = (low[:, None] + corners).reshape(-1, 4)
    keep = _touches(parts, size, radius, conjugations)
    number = torch.where(keep, keep.cumsum(0) - 1, -1).view(-1, 16)[box]
    inherited = word[:, None].expand(-1, 16)[number >= 0]
    return parts[keep], torch.nonzero(keep).flatten(), number[number >= 0], inherited, size


def _corners(size: float) -> Tensor:
    """The sixteen corners of a cube at the origin, (16, 4) float32."""
    return torch.cartesian_prod(*[torch.tensor([0.0, size], dtype=torch.float32)] * 4)


def _prune_far(low: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Make the first lists, for cubes of edge `ROOT`: codewords that may be nearer than the smallest maximum distance."""
    centre = low + ROOT / 2
    half_diagonal = ROOT + MARGIN
    box, word = [], []
    half_square = words.square().sum(-1) / 2
    for i in range(len(low)):
        # Half the squared distance from the centre, without its constant part.
        score = half_square - words @ centre[i]
        constant = centre[i].square().sum() / 2
        least = (2 * (score.min() + constant)).clamp(min=0).sqrt()
        kept = torch.nonzero(score + constant <= (least + 2 * half_diagonal) ** 2 / 2 + MARGIN).flatten()
        word.append(kept)
        box.append(torch.full_like(kept, i))
    return torch.cat(box), torch.cat(word)


def _prune(low: Tensor, size: float, box: Tensor, word: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Drop codewords that are everywhere in their cube farther than one that is nearest at its centre or at a corner."""
    centre = low + size / 2
    w = words[word]
    distance = (centre[box] - w).square().sum(-1)
    places = torch.cat((_corners(size).mean(0, keepdim=True), _corners(size)))
    for place in places:
        # From the centre to this place, the squared distance changes by -2 <place - centre, w> and a constant.
        here = distance - 2 * (w @ (place - size / 2)) + 2 * (centre @ (place - size / 2))[box]
        best = _best_of_box(here, box, len(low))
        # |x - word|² - |x - rival|² is linear in x: at the centre, less the most that it can fall within the cube.
        fall = (size + 2 * MARGIN) * (w - w[best][box]).abs().sum(-1)
        keep = distance - distance[best][box] <= fall + MARGIN**2
        box, word, w, distance = box[keep], word[keep], w[keep], distance[keep]
    return box, word


def _best_of_box(distance: Tensor, box: Tensor, boxes: int) -> Tensor:
    """Find the position of each cube's smallest distance. Every cube has at least one entry."""
    least = distance.new_full((boxes,), torch.inf).scatter_reduce(0, box, distance, "amin")
    winners = torch.nonzero(distance == least[box]).flatten()
    best = torch.zeros(boxes, dtype=torch.long)
    best[box[winners]] = winners
    return best


def _flat(corner: Tensor, dims: Tensor) -> Tensor:
    return ((corner[..., 0] * dims[1] + corner[..., 1]) * dims[2] + corner[..., 2]) * dims[3] + corner[..., 3]


@without_autocast
def nearest(x: Tensor, index: CellIndex) -> Tensor:
    """Code of the nearest codeword.

    Args:
        x: (n, 4) float32, finite.
        index: the codebook's index, on the same device.

    Returns:
        (n,) int64. Where two codewords are equally near to within rounding, either.
    """
    if len(x) == 0:
        return torch.zeros(0, dtype=torch.long, device=x.device)
    return torch.cat([_nearest(part, index) for part in x.split(BATCH)])


def _nearest(x: Tensor, index: CellIndex) -> Tensor:
    device = x.device
    all_units, product = units(device=device), group_table().to(device)
    p = nearest_unit(x)
    z = hamilton(conjugate(all_units)[p], x)
    if index.conjugations:
        v, reduction = canonical_rotation(z[:, 1:])
        z = torch.cat((z[:, :1], v), dim=-1)
    place = z / ROOT
    corner = place.floor()
    # Rounding may leave a chunk slightly outside the region; the cube beside it has its candidates, due to MARGIN.
    corner = torch.maximum(corner, index.origin).minimum(index.origin + index.dims - 1)
    node = index.roots[_flat(corner.long() - index.origin, index.dims)].long()
    place = (place - corner).clamp(0, 1)
    for _ in range(index.depth):
        half = place >= 0.5
        place = (2 * place - half.float()).clamp(0, 1)
        part = (half * torch.tensor([8, 4, 2, 1], device=device)).sum(-1)
        node = torch.where(node < -1, index.children[(-2 - node).clamp(min=0), part].long(), node)
    cell = node
    far = (cell < 0) | (z.square().sum(-1) > index.radius**2)
    listed = index.candidates[cell.clamp(min=0).long()].long()
    score = torch.einsum("nkc,nc->nk", index.points[listed], z) - index.bias[listed]
    code = index.codes[listed.gather(1, score.argmax(1, keepdim=True)).squeeze(1)]
    s, unit = code // UNITS, code % UNITS
    if index.conjugations:
        # x = q_p·g·z·ḡ, so the codeword for x is q_p·(g·q_unit·ḡ)·(g·s·ḡ).
        g = _rotation_units().to(device)[reduction]
        inverse = product.argmin(1)  # the column of +1, unit 0
        unit = product[product[g, unit], inverse[g]]
        base, rotation = s // 12, s % 12
        conjugated = product[g, _rotation_order(device)[rotation]]
        s = base * 12 + _rotation_number(device)[conjugated]
    code = s * UNITS + product[p, unit]
    if far.any():
        code[far] = brute_force(x[far], index.words)
    return code


@cache
def _rotation_order(device: torch.device) -> Tensor:
    """Unit u of each rotation u·s·ū, in the codebook's order: one of each pair ±u."""
    return torch.tensor([0, 2, 4, 6, 8, 9, 10, 11, 12, 13, 14, 15], device=device)


@cache
def _rotation_number(device: torch.device) -> Tensor:
    """Find the number of each of the 24 units' rotations; u and -u have the same."""
    order = _rotation_order(torch.device("cpu"))
    all_units = units()
    same = (all_units @ all_units[order].T).abs() > 0.99
    return same.int().argmax(1).to(device)


def reduction_tables() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the group's tables for the reduction to the small region, int64.

    Returns:
        product: (24, 24), of two units.
        inverse: (24,).
        reduction_unit: (12,), for each outcome of `canonical_rotation` the unit g with rotated = ḡ·v·g.
        rotation_unit: (12,), the unit of each rotation u·s·ū, in the codebook's order.
        unit_rotation: (24,), the rotation of each unit.
    """
    cpu = torch.device("cpu")
    product = group_table()
    return product, product.argmin(1), _rotation_units(), _rotation_order(cpu), _rotation_number(cpu)


@without_autocast
def brute_force(x: Tensor, words: Tensor) -> Tensor:
    """Find the nearest codewords by comparing all of them, the definition: (n, 4), (m, 4) -> (n,) int64."""
    bias = words.square().sum(-1) / 2
    return torch.cat([(part @ words.T - bias).argmax(1) for part in x.split(max(1, (1 << 24) // len(words)))])
