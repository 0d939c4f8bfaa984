"""Vectors cut into chunks of four numbers, read as quaternions."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad


def to_chunks(x: Tensor) -> Tensor:
    """(..., d) -> (..., ceil(d / 4), 4), padded with zeros."""
    return pad(x, (0, -x.shape[-1] % 4)).unflatten(-1, (-1, 4))


def from_chunks(chunks: Tensor, dim: int) -> Tensor:
    """(..., n, 4) -> (..., dim), the padding dropped."""
    return chunks.flatten(-2)[..., :dim]
