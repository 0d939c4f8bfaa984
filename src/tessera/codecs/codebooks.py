"""Secondary codebooks: drawn at random as in the HQMQ paper, or optimised once and shipped (see `make_codebooks`)."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from tessera.files import brief
from tessera.quaternion import UNITS, conjugate, hamilton, left_matrix, right_matrix, units

#: Numbers of unit secondaries that are shipped. 5, 10, 21, 42, 85, 170 fill 7 to 12 bits; the paper's are beside them.
DIRECTION_SIZES = (5, 10, 21, 24, 42, 48, 85, 96, 170, 192)
#: Bits per chunk for which joint codebooks are shipped: a quarter of them is the codec's number: ``hqmq:4`` has 16.
JOINT_BITS = (8, 10, 12, 14, 16, 18, 20)

#: Number of points that a kernel holds in two registers for each component.
TABLE = 128

_DATA = Path(__file__).parent / "data"

#: Shape and dtype of an array.
Wanted = tuple[tuple[int, ...], np.dtype[Any]]


def joint_path(bits: int) -> Path:
    """File of the joint codebook with 2^bits codewords."""
    return _DATA / f"joint_{bits}.npz"


def direction_path() -> Path:
    """File of the optimised unit secondaries."""
    return _DATA / "directions.npz"


def joint_shape(bits: int) -> tuple[int, bool, int]:
    """(secondaries, whether the codebook is closed under s -> u·s·ū, largest integer) of a joint codebook.

    There are as many codewords as the bits allow. Below 2^16 codewords the conjugations cost some error (6 % at 12 bits) and
    the table is small anyway; from there on they cost under 1 %.
    """
    conjugations = bits >= 16
    size = (1 << bits) // (UNITS * (12 if conjugations else 1))
    return size, conjugations, 127 if bits <= 16 else 1023


def random_secondary(size: int, heads: int, layer: int, role: str, seed: int) -> Tensor:
    """The paper's codebooks: independent uniform unit quaternions for every (layer, head, role).

    Returns:
        (heads, size, 4) float32. A head's codebook does not depend on how many heads there are.
    """
    books = []
    for head in range(heads):
        rng = np.random.Generator(np.random.PCG64([seed, layer, head, int(role == "value")]))
        q = rng.standard_normal((size, 4))
        books.append(q / np.linalg.norm(q, axis=1, keepdims=True))
    return torch.from_numpy(np.stack(books)).float()


@cache
def _direction_tables() -> dict[int, Tensor]:
    return read_directions(direction_path())


def read_directions(path: str | os.PathLike[str]) -> dict[int, Tensor]:
    """Unit secondaries from a file that `make_codebooks` wrote: by number S, (S, 4) float32.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or holds something else.
    """
    found = read_arrays(path, {f"s{size}": ((size, 4), np.dtype(np.float32)) for size in DIRECTION_SIZES})
    for name, book in found.items():
        if not np.allclose(np.linalg.norm(book.astype(np.float64), axis=1), 1, atol=1e-3):
            raise ValueError(f"{os.fspath(path)} is damaged: {name!r} does not hold unit quaternions")
    return {int(name[1:]): torch.from_numpy(book) for name, book in found.items()}


def optimised_secondary(size: int) -> Tensor:
    """The shipped unit secondaries: (size, 4) float32. One codebook serves every head and layer."""
    if size not in DIRECTION_SIZES:
        raise ValueError(f"no optimised codebook of {size} secondaries; there are {', '.join(map(str, DIRECTION_SIZES))}")
    return _direction_tables()[size].clone()


#: Twelve units, one of each pair ±u: the rotations s -> u·s·ū of the vector part, in the order that codes use.
ROTATIONS = (0, 2, 4, 6, 8, 9, 10, 11, 12, 13, 14, 15)


@dataclass(frozen=True, eq=False)
class JointCodebook:
    """A codebook of 4-vectors q_p·q_s, all 24 units p times secondaries s of any length.

    Eight of the units, ±1, ±i, ±j, ±k, only permute components and change signs, and so do their products with v̄ from the
    right, v in {1, i, j, k}. So the codewords fall into orbits of a group of signed permutations, and a code names an orbit's
    representative and a signed permutation: code = representative · permutations + permutation. A decoder needs the table of
    representatives and only exchanges components and changes signs.

    Attributes:
        bits: width of a code, in bits.
        base: (n, 4) int16, what is shipped.
        step: what one integer is worth, for chunks of unit mean square.
        conjugations: whether every rotation u·s·ū of a base quaternion is a secondary too; the secondaries then have numbers
            base · 12 + rotation.
        nmse: mean squared error over mean square, of Gaussian chunks.
    """

    bits: int
    base: Tensor
    step: float
    conjugations: bool
    nmse: float

    @property
    def products(self) -> Tensor:
        """All codewords as integers: (24 S, 4) int16, row s · 24 + p is q_p·q_s."""
        return _products(self.base, self.conjugations)

    @property
    def representatives(self) -> Tensor:
        """One codeword of each orbit, from which signed permutations make all: (9 n, 4) int16 with conjugations, else (3 n, 4).

        Conjugation by ω permutes the last three components cyclically. With conjugations the representatives are ordered so
        that kernels need tables for a third of them only: of m = 3 n the largest multiple of `TABLE`, these permuted once,
        these permuted twice; then the remaining ones in the same three forms.
        """
        found = _representatives(self.base, self.conjugations)
        return torch.empty_like(found).index_copy_(0, _places(len(self.base), self.conjugations), found)

    @property
    def signed_permutations(self) -> tuple[Tensor, Tensor]:
        """Permutations and signs: (n, 4) int64 each, n = 32 with conjugations, else 8. x becomes sign · x[permutation]."""
        return _signed_permutations(self.conjugations)

    @property
    def codewords(self) -> Tensor:
        """All codewords in the order of their codes, as integers: (24 S, 4) int16."""
        return _orbits(self.representatives, self.signed_permutations)

    @cached_property
    def codes(self) -> Tensor:
        """The codes of all products, (24 S,) int64."""
        order, count = _order(self.conjugations), len(self.signed_permutations[0])
        code = (torch.arange(len(self.base))[:, None] * len(order) + order).flatten()
        return _places(len(self.base), self.conjugations)[code // count] * count + code % count


def _integers(q: Tensor) -> Tensor:
    return q.round().to(torch.int16).reshape(-1, 4)


def _products(base: Tensor, conjugations: bool) -> Tensor:
    s = base.float()
    if conjugations:
        u = units()[list(ROTATIONS)]
        s = hamilton(hamilton(u, s[:, None]), conjugate(u)).reshape(-1, 4)
    return _integers(hamilton(units(), s[:, None]))


def _representatives(base: Tensor, conjugations: bool) -> Tensor:
    # Powers of ω = (1 + i + j + k) / 2 take {±1, ±i, ±j, ±k} to its three cosets in the group.
    one, omega = units()[0], units()[8]
    powers = torch.stack((one, omega, hamilton(omega, omega)))
    s = base.float()[:, None]
    if conjugations:
        s = hamilton(hamilton(powers, s), conjugate(powers))[:, None]
        return _integers(hamilton(powers[:, None], s))
    return _integers(hamilton(powers, s))


def _places(size: int, conjugations: bool) -> Tensor:
    """Find the number of each of `_representatives` in the codebook, (n,) int64."""
    if not conjugations:
        return torch.arange(3 * size)
    count = 3 * size
    whole = count // TABLE * TABLE
    number, shift = torch.arange(count)[:, None], torch.arange(3)
    return torch.where(number < whole, shift * whole + number, 2 * whole + shift * (count - whole) + number).flatten()


@cache
def _signed_permutations(conjugations: bool) -> tuple[Tensor, Tensor]:
    left, right = left_matrix(units()[:8]), right_matrix(conjugate(units()[0 : 8 if conjugations else 2 : 2]))
    matrices = (left[:, None] @ right[None]).reshape(-1, 4, 4)
    permutation = matrices.abs().argmax(-1)
    return permutation, matrices.gather(-1, permutation.unsqueeze(-1)).squeeze(-1).long()


def _orbits(representatives: Tensor, signed_permutations: tuple[Tensor, Tensor]) -> Tensor:
    permutation, sign = signed_permutations
    return (representatives[:, permutation] * sign.to(representatives.dtype)).reshape(-1, 4)


@cache
def _order(conjugations: bool) -> Tensor:
    probe = torch.tensor([[22, 10, 6, 4]])  # all of its products are different
    codes = _orbits(_representatives(probe, conjugations), _signed_permutations(conjugations))
    same = (_products(probe, conjugations)[:, None] == codes).all(-1)
    assert (same.sum(0) == 1).all()
    assert (same.sum(1) == 1).all()
    return same.int().argmax(1)


@cache
def joint(bits: int) -> JointCodebook:
    """Load the shipped joint codebook of at most 2^bits codewords."""
    if bits not in JOINT_BITS:
        raise ValueError(f"no joint codebook of {bits} bits; there are {', '.join(map(str, JOINT_BITS))}")
    return read_joint(joint_path(bits), bits)


def read_joint(path: str | os.PathLike[str], bits: int) -> JointCodebook:
    """A joint codebook of `bits` bits from a file that `make_codebooks` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or holds something else.
    """
    size, conjugations, largest = joint_shape(bits)
    number = np.dtype(np.float32)
    wanted: dict[str, Wanted] = {"secondary": ((size, 4), np.dtype(np.int16)), "step": ((), number), "nmse": ((), number)}
    found = read_arrays(path, wanted)
    base, step, nmse = found["secondary"], float(found["step"]), float(found["nmse"])
    # Kernels store the integers in as few bits as the largest needs, and half of an even sum is an integer.
    if np.abs(base.astype(np.int64)).max() > largest or (base.sum(axis=1) % 2).any():
        raise ValueError(f"{os.fspath(path)} is damaged: its numbers are not in the lattice, or are larger than {largest}")
    if not 0 < step < 1 or not 0 <= nmse < 1:
        raise ValueError(f"{os.fspath(path)} is damaged: its step is {step} and its error {nmse}")
    return JointCodebook(bits, torch.from_numpy(base), step, conjugations, nmse)


def read_arrays(path: str | os.PathLike[str], wanted: Mapping[str, Wanted]) -> dict[str, NDArray[Any]]:
    """The arrays of an ``.npz`` file whose shapes and dtypes are known: nothing else is loaded.

    Args:
        path: path of the file.
        wanted: shape and dtype of every array that there must be, by name; no other may be there.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or holds something else, Python objects among it.
    """
    name = os.fspath(path)
    found: dict[str, NDArray[Any]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            if sorted(archive.namelist()) != sorted(f"{key}.npy" for key in wanted):
                raise ValueError(f"it holds {brief(archive.namelist())}")
            for key, (shape, dtype) in wanted.items():
                with archive.open(f"{key}.npy") as member:
                    found[key] = _read_array(member, shape, dtype)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged archive raises various errors of zipfile, zlib and numpy's parser
        raise ValueError(f"{name} is damaged: {brief(error)}") from None
    return found


def _read_array(member: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    if npy.read_magic(member) != (1, 0):
        raise ValueError("an array of another version of the format")
    header = npy.read_array_header_1_0(member)
    if header != (shape, False, dtype):
        raise ValueError(f"an array of shape {brief(header[0])} and dtype {brief(header[2])} instead of {shape} and {dtype}")
    size = math.prod(shape) * dtype.itemsize
    data = member.read(size + 1)  # and beyond the end, where zipfile compares the checksum
    if len(data) != size:
        raise ValueError(f"an array of {len(data)} bytes or more instead of {size}")
    return np.frombuffer(data, dtype).reshape(shape).copy()
