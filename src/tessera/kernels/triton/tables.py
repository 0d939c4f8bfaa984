"""Tables of the Triton kernels: codewords, levels, rotations, the search's index."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from tessera.kernels.joint import JointFormat
from tessera.kernels.nearest import CellIndex, reduction_tables
from tessera.kernels.scalars import ScalarFormat
from tessera.kernels.triton.formats import FRACTION, HELD, TERMS, Readable, fits_shared_memory, point_bits, whole_words
from tessera.quaternion import units


@cache
def index_tables(index: CellIndex) -> tuple[Tensor, ...]:
    """Return the candidate lists and the group's tables in the form of the kernel, on the index's device."""
    device = index.roots.device
    first, count, points, codes = index.lists()
    group = [table.flatten().int() for table in reduction_tables()]
    return tuple(t.to(device).contiguous() for t in (first, count, points, codes, units(), *group))


@cache
def index_bounds(index: CellIndex) -> tuple[int, ...]:
    """Return the origin and the dims of the cubes as the kernel's numbers, read from the device once."""
    return (*index.origin.tolist(), *index.dims.tolist())


@cache
def index_bias(index: CellIndex) -> Tensor:
    """Return half the squared length of each codeword."""
    return index.words.square().sum(-1) / 2


def column_order(form: Readable, lookup: str, dim: int) -> list[int]:
    """Return the kernel's order of channels, those of the first tile and then those of the second.

    Of chunks these are numbers 0 and 1 of every chunk, and 2 and 3 of every chunk. Of words they are the pairs of numbers that
    are 16 bits apart, the lower half of the pairs of every word and the upper half of them.
    """
    if not whole_words(form, lookup, dim):
        return [4 * chunk + part + j for part in (0, 2) for chunk in range(dim // 4) for j in (0, 1)]
    step = 16 // form.bits  # numbers in half a word
    order = [
        2 * step * word + pair + step * j
        for part in (0, step // 2)
        for word in range(dim // (2 * step))
        for pair in range(part, part + step // 2)
        for j in (0, 1)
    ]
    if isinstance(form, ScalarFormat) and form.numbers == "blocks" and form.bits == 4:
        # A byte of a block holds two numbers that are 16 apart.
        return [n // 32 * 32 + n % 32 // 2 + n % 2 * 16 for n in order]
    return order


@cache
def rotations(form: Readable, lookup: str, dim: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return three (dim, dim) matrices: x @ the first rotates x into the kernel's order of channels; the second is the same in
    float16; x @ the third rotates values back and multiplies them by `value_gain`."""
    matrix = torch.eye(dim, dtype=torch.float32)
    if form.signs.numel():
        hadamard = torch.ones(1, 1, dtype=torch.float32)
        while len(hadamard) * len(form.dct) < dim:
            hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float32), hadamard) / 2**0.5
        matrix = (torch.kron(form.dct, hadamard) * form.signs).T
    matrix = matrix[:, column_order(form, lookup, dim)].contiguous().to(device)
    return matrix, matrix.half(), (matrix.T * form.value_gain).contiguous()


@cache
def tables(form: Readable, lookup: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the table of a lookup, the moves, and the scales; those that a format has not have a single element.

    A move is the word of `_moves`. A point is four bytes in the order 0, 2, 1, 3 of its components, each a sign and seven bits,
    or, where these do not suffice and where nothing but signs is left to do, four half-precision numbers.
    """
    if isinstance(form, JointFormat):
        return _points(form, lookup).contiguous().to(device), _moves(form).to(device), form.scales.to(device)
    none = torch.zeros(1, dtype=torch.int32)
    table = none
    if lookup == "curve":
        table = curve(form.levels)
    elif form.numbers == "levels":
        low, high = (level.reshape(-1) for level in torch.meshgrid(form.levels, form.levels, indexing="xy"))
        table = torch.stack((low, high), dim=-1).half().view(torch.int32).squeeze(-1)
    return table.contiguous().to(device), none.to(device), none.float().to(device)


def curve(levels: Tensor) -> Tensor:
    """Return the coefficients of the odd polynomial that gives n levels, which are almost symmetrical about 0.

    Code c has the level x · p(x²), where x = (2 c + 1) / n - 1. Computed in half precision all are within 0.15 %.

    Args:
        levels: (n,) float32, ascending.

    Returns:
        (terms,) float16, those of p from the constant one on.
    """
    n = len(levels)
    x = (2 * torch.arange(n // 2, n, dtype=torch.float64) + 1) / n - 1
    wanted = (levels[n // 2 :] - levels[: n // 2].flip(0)).double() / 2
    # Each divided by its level, to minimise the relative error.
    powers = x[:, None] ** (2 * torch.arange(TERMS[n.bit_length() - 1]) + 1) / wanted[:, None]
    rest, found = torch.ones(len(x), 1, dtype=torch.float64), []
    for term in reversed(range(powers.shape[1])):
        # Rounded one by one, so that later coefficients compensate for the rounding.
        found.append(torch.linalg.lstsq(powers[:, : term + 1], rest).solution[-1].half())
        rest = rest - powers[:, term : term + 1] * found[-1].double()
    return torch.cat(found[::-1])


def _points(form: JointFormat, lookup: str) -> Tensor:
    """Return the table of a lookup of codewords."""
    # There is a row for every value of a code, zero for codes outside of the codebook.
    points = torch.zeros(1 << (form.bits - form.permutation_bits), 4, dtype=torch.long)
    points[: len(form.representatives)] = form.representatives.long()
    if lookup == "held" and not fits_shared_memory(form):
        raise ValueError(f"shared memory holds up to {HELD} points of bytes; a code of {form.bits} bits has {len(points)}")
    if lookup == "halves":
        return _pairs((points[:, form.permutation] * form.sign).flatten(0, 1))
    if lookup == "signs":
        places = torch.arange(4)
        return _pairs(points[:, places ^ places[:, None]].flatten(0, 1))
    if point_bits(form) > 8:
        return _pairs(points)
    bytes_ = points.abs() | (points < 0).long() << 7
    return (bytes_[:, [0, 2, 1, 3]] << torch.arange(4) * 8).sum(-1).to(torch.uint32).view(torch.int32)


def _pairs(points: Tensor) -> Tensor:
    """Pack (n, 4) integers to (n,) int64 of four half-precision numbers integer / `FRACTION`, the first in the lowest bits."""
    return (points / FRACTION).half().view(torch.int64).squeeze(-1)


def _moves(form: JointFormat) -> Tensor:
    """Return an int32 word for each move: the exchange x ^ a of components in bits 0 and 1, a & 2 again in bit 3; and for
    negations, the sign bits of the first pair's halves, and one bit lower those of the second's.
    """
    exchange = form.permutation[:, 0]
    if not torch.equal(form.permutation, torch.arange(4) ^ exchange[:, None]):
        raise ValueError("the kernel knows moves that exchange components by pairs alone")
    negated = (form.sign < 0).long()
    signs = (negated << torch.tensor([15, 31, 14, 30])).sum(-1)
    return (exchange | (exchange & 2) << 2 | signs).to(torch.uint32).view(torch.int32)
