"""Quaternions and the 24 Hurwitz units, the binary tetrahedral group 2T.

A quaternion w + xi + yj + zk is the last axis of a tensor, in the order (w, x, y, z). The units are the vertices of the
24-cell: eight of the form ±1, ±i, ±j, ±k and sixteen of the form (±1 ± i ± j ± k)/2. They are closed under the Hamilton
product and sixty degrees apart at the least.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

UNITS = 24


def hamilton(p: Tensor, q: Tensor) -> Tensor:
    """Hamilton product p·q.

    Args:
        p, q: (..., 4), broadcast against each other.

    Returns:
        (..., 4), in the promoted dtype.
    """
    pw, px, py, pz = p.unbind(-1)
    qw, qx, qy, qz = q.unbind(-1)
    return torch.stack(
        (
            pw * qw - px * qx - py * qy - pz * qz,
            pw * qx + px * qw + py * qz - pz * qy,
            pw * qy - px * qz + py * qw + pz * qx,
            pw * qz + px * qy - py * qx + pz * qw,
        ),
        dim=-1,
    )


def conjugate(q: Tensor) -> Tensor:
    """Return the conjugate of q: (..., 4) -> (..., 4). For a unit quaternion it is the inverse."""
    return torch.cat((q[..., :1], -q[..., 1:]), dim=-1)


@cache
def _units() -> Tensor:
    axes = torch.eye(4, dtype=torch.float32)
    signed = torch.stack((axes, -axes), dim=1).reshape(8, 4)
    bits = torch.arange(16)[:, None] >> torch.tensor([3, 2, 1, 0]) & 1
    halves = 0.5 - bits.float()
    return torch.cat((signed, halves))


def units(dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
    """The 24 units of 2T, (24, 4), always in this order.

    0..7 are +1, -1, +i, -i, +j, -j, +k, -k. 8..23 are (±1 ± i ± j ± k)/2, where unit 8 + m has a minus sign at each bit
    set in m, the bit of value 8 belonging to the real part and the bit of value 1 to k.
    """
    return _units().to(dtype=dtype, device=device, copy=True)


@cache
def _group_table() -> Tensor:
    u = _units()
    return nearest_unit(hamilton(u[:, None], u[None, :]))


def group_table() -> Tensor:
    """Return the indices of all products: (24, 24) int64, ``units()[table[a, b]] == units()[a] · units()[b]``."""
    return _group_table().clone()


def unit_projection(x: Tensor) -> Tensor:
    """The largest inner product of x with any unit, max over p of <x, q_p>: (..., 4) -> (...).

    Closed form: the best of the eight axis units gives the largest |component|, the best of the sixteen others half the
    sum of all |components|.
    """
    a = x.abs()
    return torch.maximum(a.amax(-1), a.sum(-1) * 0.5)


def nearest_unit(x: Tensor) -> Tensor:
    """Index of the unit nearest to x, which is the one of largest inner product: (..., 4) -> (...) int64.

    No search: see `unit_projection`. Ties go to the axis unit and to the first component; x = 0 gives unit 0.
    """
    a = x.abs()
    biggest, axis = a.max(-1)
    negative = x < 0
    axis_unit = 2 * axis + negative.gather(-1, axis.unsqueeze(-1)).squeeze(-1)
    weights = 1 << torch.arange(3, -1, -1, device=x.device)
    half_unit = 8 + (negative * weights).sum(-1)
    return torch.where(a.sum(-1) * 0.5 > biggest, half_unit, axis_unit)


def left_matrix(q: Tensor) -> Tensor:
    """Return the matrix of y -> q·y: (..., 4) -> (..., 4, 4), so that ``left_matrix(q) @ y == hamilton(q, y)``."""
    basis = torch.eye(4, dtype=q.dtype, device=q.device)
    return hamilton(q.unsqueeze(-2), basis).transpose(-1, -2)


def right_matrix(q: Tensor) -> Tensor:
    """Return the matrix of y -> y·q: (..., 4) -> (..., 4, 4), so that ``right_matrix(q) @ y == hamilton(y, q)``."""
    basis = torch.eye(4, dtype=q.dtype, device=q.device)
    return hamilton(basis, q.unsqueeze(-2)).transpose(-1, -2)
