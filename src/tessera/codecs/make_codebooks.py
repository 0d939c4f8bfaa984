"""Makes the optimised codebooks in ``data/``: ``python -m tessera.codecs.make_codebooks`` (needs scipy; about ten minutes).

No data of any model is used, only random numbers from a fixed seed: Lloyd's algorithm in a quotient by the 24 units.
Averaging a sample after the symmetry that maps its nearest codeword onto a representative keeps the symmetry, so that
only the representatives, the secondary quaternions, have to be kept.

Two kinds are made:

- directions: unit secondaries for uniformly distributed directions (`HQMQ(codebook="optimised")`);
- joint: secondaries that are not units but contain the radius, for Gaussian chunks (`JointHQMQ`, behind ``hqmq:4``). They are
  rounded to integers with an even sum, the lattice D4, on which all 24 units act without leaving the integers: a
  decoder needs no arithmetic that rounds. The larger ones also have the symmetry s -> u·s·ū, twelve times fewer
  secondaries for the same number of codewords, at half a per cent more error.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tessera.codecs.codebooks import DIRECTION_SIZES, JOINT_BITS, direction_path, joint_path, joint_shape
from tessera.quaternion import UNITS, left_matrix, right_matrix, units

Array = NDArray[np.float64]

#: Chunks come from vectors of unit root mean square of this many numbers, between the usual head dims 64 and 128.
VECTOR = 96


def symmetries(conjugations: bool) -> Array:
    """The group acting on R^4 as matrices: (24, 4, 4), or (288, 4, 4) with the rotations s -> u·s·ū as well."""
    u = units(torch.float64)
    left = left_matrix(u)
    if not conjugations:
        return left.numpy()
    both = torch.einsum("aij,bjk->abik", left, right_matrix(u)).reshape(-1, 4, 4)
    return torch.unique(both, dim=0).numpy()


def lloyd(start: Array, group: Array, sample: list[Array], unit: bool) -> Array:
    """Run a step of Lloyd's algorithm for each array of samples. start: (S, 4); group: (g, 4, 4); samples: (n, 4)."""
    from scipy.spatial import cKDTree

    s = start
    for x in sample:
        words = np.einsum("gij,sj->gsi", group, s).reshape(-1, 4)
        _, index = cKDTree(words).query(x, workers=-1)
        g, which = np.divmod(index, len(s))
        back = np.einsum("nji,nj->ni", group[g], x)  # the transpose of a rotation is its inverse
        count = np.bincount(which, minlength=len(s))
        total = np.stack([np.bincount(which, back[:, c], len(s)) for c in range(4)], axis=1)
        s = np.where(count[:, None] > 0, total / np.maximum(count, 1)[:, None], x[: len(s)])
        if unit:
            s = s / np.linalg.norm(s, axis=1, keepdims=True)
    return s


def gaussian_chunks(rng: np.random.Generator, count: int) -> Array:
    """Chunks of vectors normalised as the codec does it, to within the rounding of its scale: (count, 4)."""
    x = rng.standard_normal((count * 4 // VECTOR, VECTOR))
    x /= np.sqrt((x**2).mean(axis=1, keepdims=True))
    x *= 2 ** rng.uniform(-1 / 16, 1 / 16, (len(x), 1))
    return x.reshape(-1, 4)


def directions(rng: np.random.Generator, count: int) -> Array:
    """Uniform directions: (count, 4)."""
    x = rng.standard_normal((count, 4))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def round_to_d4(x: Array) -> NDArray[np.int64]:
    """Nearest integers with an even sum: round, and where the sum is odd round the worst component the other way."""
    near = np.rint(x)
    off = x - near
    odd = near.sum(axis=1) % 2 != 0
    worst = np.abs(off).argmax(axis=1)
    rows = np.flatnonzero(odd)
    step = np.where(off[rows, worst[rows]] >= 0, 1, -1)
    near[rows, worst[rows]] += step
    return near.astype(np.int64)


def make_directions(size: int) -> Array:
    """Unit secondaries (size, 4)."""
    rng = np.random.default_rng([1, size])
    many = max(200_000, 600 * size)
    steps = [directions(rng, many) for _ in range(60)]
    return lloyd(directions(rng, size), symmetries(False), steps, unit=True)


def make_joint(bits: int) -> tuple[NDArray[np.int16], float]:
    """Integer secondaries (S, 4) and the step that turns them into numbers for chunks of unit mean square."""
    size, conjugations, largest = joint_shape(bits)
    rng = np.random.default_rng([2, bits])
    group = symmetries(conjugations)
    # Good quantisers put codewords with the density of the source to the power 4/6: a Gaussian of variance 3/2.
    s = rng.standard_normal((size, 4)) * 1.5**0.5
    small, large = min(max(100_000, 600 * size), 800_000), min(max(1_000_000, 600 * size), 3_000_000)
    for many, steps in ((small, 30), (large, 10)):
        for _ in range(steps):
            s = lloyd(s, group, [gaussian_chunks(rng, many)], unit=False)
    step = float(np.linalg.norm(s, axis=1).max()) / (largest - 1)
    whole = round_to_d4(s / step)
    order = np.argsort((whole**2).sum(axis=1), kind="stable")  # sorted by radius, which is easier to read and compresses better
    return whole[order].astype(np.int16), step


def measure(bits: int, secondary: NDArray[np.int16], step: float) -> float:
    """Normalised mean squared error on fresh samples."""
    from scipy.spatial import cKDTree

    group = symmetries(joint_shape(bits)[1])
    words = np.einsum("gij,sj->gsi", group, secondary * step).reshape(-1, 4)
    x = gaussian_chunks(np.random.default_rng(3), 1_000_000)
    distance, _ = cKDTree(words).query(x, workers=-1)
    return float((distance**2).sum() / (x**2).sum())


def main() -> None:
    """Write all files."""
    Path(joint_path(16)).parent.mkdir(exist_ok=True)
    for bits in JOINT_BITS:
        secondary, step = make_joint(bits)
        nmse = measure(bits, secondary, step)
        print(f"joint {bits:2d} bits: {len(secondary)} secondaries, nMSE {nmse:.5f}", flush=True)
        np.savez_compressed(joint_path(bits), secondary=secondary, step=np.float32(step), nmse=np.float32(nmse))
    tables = {f"s{size}": make_directions(size).astype(np.float32) for size in DIRECTION_SIZES}
    np.savez_compressed(direction_path(), **tables)  # type: ignore[arg-type]
    assert all(size * UNITS <= 1 << 13 for size in DIRECTION_SIZES)


if __name__ == "__main__":
    main()
