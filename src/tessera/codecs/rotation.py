"""A fixed orthonormal rotation of head_dim coordinates that makes vectors look Gaussian: randomised Hadamard."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor


def rotation(dim: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """The rotation matrix R: y = x @ R.T, x = y @ R.

    Random signs, then the Hadamard matrix; for dim = m · 2^k with m odd, its Kronecker product with the DCT of size m, which
    works for any head_dim.

    Args:
        dim: number of coordinates.
        seed: seed of the signs.
        device: device of the matrix.

    Returns:
        (dim, dim) float32, orthonormal; cached, so do not write to it.
    """
    return _rotation(dim, seed, torch.device(device))


def rotation_factors(dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the factors of the rotation, for kernels that apply it factor by factor.

    Returns:
        the DCT (m, m) and the signs (dim,), float32: R = (dct ⊗ Hadamard of size dim / m, orthonormal) · diag(signs).
    """
    odd = dim
    while odd % 2 == 0:
        odd //= 2
    row, column = np.arange(odd)[:, None], np.arange(odd)[None]
    dct = np.cos(np.pi * (column + 0.5) * row / odd) * np.sqrt(2 / odd)
    dct[0] /= np.sqrt(2)
    signs = np.random.Generator(np.random.PCG64(seed)).integers(0, 2, dim) * 2 - 1
    return torch.from_numpy(dct).float(), torch.from_numpy(signs).float()


@cache
def _rotation(dim: int, seed: int, device: torch.device) -> Tensor:
    dct, signs = (factor.double() for factor in rotation_factors(dim, seed))
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) * len(dct) < dim:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), hadamard) / 2**0.5
    return (torch.kron(dct, hadamard) * signs).float().to(device)
