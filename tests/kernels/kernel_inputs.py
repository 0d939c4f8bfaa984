"""What the tests of the kernels share."""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.codecs import Codec
from tessera.kernels import Pages


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm().clamp(min=1e-12))


def make_pages(codec: Codec, batch: int, heads: int, sizes: list[int], dim: int) -> Pages:
    """Pages whose keys have a large constant channel and a wide one, inside larger buffers as a cache has them."""
    pages = []
    for size in sizes:
        k, v = torch.randn(2, batch, heads, size + 64, dim).unbind(0)
        k[..., 3] += 40
        k[..., 1] *= 30
        pages.append((codec.encode(k, "key").slice(0, size), codec.encode(v).slice(0, size)))
    return Pages(pages)
