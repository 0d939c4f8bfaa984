"""Inputs that several tests of the kernels use."""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.codecs import Codec, Packed, Role
from tessera.codecs.codebooks import joint
from tessera.codecs.fp8 import FP8
from tessera.codecs.hqmq_joint import JointHQMQ
from tessera.kernels import CompressedKV
from tessera.kernels.bits import pack_bits


class NoKernel(FP8):
    """A codec without kernels, like a new user-defined one."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = "no-kernel"

    def kernel_format(self, dim: int) -> None:  # type: ignore[override]
        return None


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm().clamp(min=1e-12))


def make_pages(codec: Codec, batch: int, heads: int, sizes: list[int], dim: int) -> CompressedKV:
    """Make pages whose keys have a large constant channel and a wide one, as slices of larger buffers, as in a cache."""
    pages = []
    for size in sizes:
        k, v = torch.randn(2, batch, heads, size + 64, dim).unbind(0)
        k[..., 3] += 40
        k[..., 1] *= 30
        pages.append((codec.encode(k, "key").slice(0, size), codec.encode(v).slice(0, size)))
    return CompressedKV(pages)


def random_codes(codec: Codec, shape: tuple[int, int, int, int], role: Role) -> Packed:
    """Draw random codes, scales and centres of a joint codebook, (batch, heads, tokens, dim), which is faster than encoding."""
    side = codec.side(role)
    assert isinstance(side, JointHQMQ)
    batch, heads, tokens, dim = shape
    codes = torch.randint(len(joint(side.code_bits).codewords), (batch, heads, tokens, dim // 4))
    tensors = {
        "codes": pack_bits(codes, side.code_bits),
        "scale": torch.randint(110, 135, (batch, heads, tokens), dtype=torch.uint8),
    }
    if role == "key" and side.centre:
        means = torch.randn(batch, heads, -(-tokens // side.group), dim).half().view(torch.int16)
        tensors["centre"] = means & -16 | torch.randint(0, 2, means.shape, dtype=torch.int16)
    return Packed(side, tensors, shape, torch.float32, role)
