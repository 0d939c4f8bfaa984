"""An independent implementation of quaternions from their definition, in NumPy and float64."""

from __future__ import annotations

import itertools

import numpy as np

#: (i, j) -> (sign, k): the product of two of 1, i, j, k, from i² = j² = k² = ijk = -1.
TABLE = {
    **{(0, n): (1, n) for n in range(4)},
    **{(n, 0): (1, n) for n in range(4)},
    **{(n, n): (-1, 0) for n in range(1, 4)},
    **{(1, 2): (1, 3), (2, 3): (1, 1), (3, 1): (1, 2), (2, 1): (-1, 3), (3, 2): (-1, 1), (1, 3): (-1, 2)},
}


def product(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Compute the quaternion product term by term."""
    out = np.zeros(np.broadcast_shapes(p.shape, q.shape))
    for (i, j), (sign, k) in TABLE.items():
        out[..., k] += sign * p[..., i] * q[..., j]
    return out


def hurwitz_units() -> np.ndarray:
    """Return ±1, ±i, ±j, ±k and (±1 ± i ± j ± k)/2, (24, 4)."""
    axes = [sign * row for row in np.eye(4) for sign in (1, -1)]
    return np.array([*axes, *(np.array(signs) / 2 for signs in itertools.product((1, -1), repeat=4))])
