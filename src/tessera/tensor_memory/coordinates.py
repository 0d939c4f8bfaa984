"""The geometry of the grid: places of cells, weights of writes, interpolation of reads.

Places are in [-1, 1]^n, ordered (x: width, y: height, z: depth) as in `torch.nn.functional.grid_sample`; a grid is ordered
(depth, height, width). The centres of the first and the last cell of an axis are at its ends.

A write is a product over the axes: its weights are kept as one vector for each axis, in the order of the grid.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from tessera.devices import upload
from tessera.kernels.recurrent_grid import interpolate

#: Weight of a Gaussian along an axis below which a cell is outside the footprint of a write: that at three standard deviations.
FLOOR = 0.01
#: Keeps the exponent of a write finite (the paper's eps).
_EPSILON = 1e-6


def centres(size: int, device: torch.device | None = None) -> Tensor:
    """Return the centres of the cells along an axis, (size,) float32."""
    if size == 1:
        return torch.zeros(1, dtype=torch.float32, device=device)
    return torch.linspace(-1, 1, size, dtype=torch.float32, device=device)


def gaussian(at: Tensor, sigma: Tensor, grid: tuple[int, ...], local: bool = False) -> tuple[Tensor, ...]:
    """exp(-|p - at|² / (2 sigma² + eps)) for the cells p, by axes.

    Args:
        at: (..., n).
        sigma: (...).
        grid: n sizes.
        local: whether weights along each axis below `FLOOR` are exactly zero, continuously.

    Returns:
        for each axis of the grid (..., size), whose outer product the weights are.
    """
    width = (2 * sigma.square() + _EPSILON).unsqueeze(-1)
    factors = []
    for axis, size in enumerate(grid):
        distance = centres(size, at.device) - at[..., len(grid) - 1 - axis, None]
        weight = torch.exp(-distance.square() / width)
        factors.append((weight - FLOOR).clamp(min=0) / (1 - FLOOR) if local else weight)
    return tuple(factors)


def nearest(at: Tensor, grid: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Return one at the cell nearest to `at`, (..., n), and zero elsewhere, by axes like `gaussian`."""
    places = positions(at, grid).round().long()
    return tuple(one_hot(places[..., axis], size).to(at.dtype) for axis, size in enumerate(grid))


def positions(at: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Places in cells, (..., n) in the order of the grid; beyond the border they are on it."""
    last = upload(torch.tensor(grid, dtype=at.dtype) - 1, at.device)
    return (at.clamp(-1, 1).flip(-1) + 1) / 2 * last


def sample(h: Tensor, at: Tensor) -> Tensor:
    """Interpolate cells multilinearly at places, clamped to the grid's border.

    Args:
        h: (batch, channels, *grid).
        at: (batch, reads, n).

    Returns:
        (batch, reads, channels).
    """
    return interpolate(solid(h), pad(positions(at, tuple(h.shape[2:])), (3 - at.shape[-1], 0)))


def solid(h: Tensor) -> Tensor:
    """Reshape (batch, channels, *grid) to three axes; missing axes come first with one cell."""
    return h[(slice(None), slice(None), *[None] * (5 - h.ndim))]
