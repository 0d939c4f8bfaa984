"""``scalar:b``: rotation and the best scalar quantiser for Gaussian numbers, the mean-squared-error form of TurboQuant.

TurboQuant (arXiv 2504.19874) rotates a vector, rounds each coordinate to Lloyd–Max levels and keeps the norm. As in vLLM the
kept scale is |x| over the norm of the levels chosen, so that x̂ has the norm of x ("norm correction").
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, lru_cache

import torch
from torch import Tensor

from tessera.codecs.base import Codec, Layout, Packed, Role
from tessera.codecs.lloyd_max import lloyd_max
from tessera.codecs.registry import register
from tessera.codecs.rotation import rotation
from tessera.codecs.scalar_format import scalar_format
from tessera.devices import upload
from tessera.kernels import dispatch
from tessera.kernels.bits import packed_bytes, unpack_bits
from tessera.kernels.scalars import ScalarFormat

HALF_MAX = 65504.0


class Scalar(Codec):
    """Rotation, Lloyd–Max levels for N(0, 1), one half-precision scale per vector.

    The scale of least squared error, <x, levels> / |levels|², would be smaller by the cosine between x and x̂; keeping the
    norm instead raises the error by 0.2 % at 4 bits and by 3 % at 2.

    True bits per element: b + 16/d.

    Args:
        bits: b, 2 to 6.
    """

    fields: Mapping[str, Layout] = {"codes": "token", "scale": "token"}

    def __init__(self, bits: int = 4) -> None:
        if not 2 <= bits <= 6:
            raise ValueError(f"scalar takes 2 to 6 bits, got {bits}")
        self.bits = bits
        self.spec = f"scalar:{bits}"

    def kept(self, heads: int, dim: int, role: Role) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See `Codec`."""
        return {"codes": ((packed_bytes(dim, self.bits),), torch.uint8), "scale": ((), torch.float16)}

    def _encode(self, x: Tensor, role: Role, layer: int) -> dict[str, Tensor]:
        dim = x.shape[-1]
        x = x @ rotation(dim, device=x.device).T
        norm = x.norm(dim=-1, keepdim=True)
        levels = upload(normal_levels(self.bits), x.device)
        length, bounds = norm.clamp(min=torch.finfo(torch.float32).tiny), (levels[1:] + levels[:-1]) / 2
        codes, chosen = dispatch.pack_levels(x, length, dim**0.5, bounds, levels, self.bits)
        scale = norm.squeeze(-1) / chosen.norm(dim=-1)
        return {"codes": codes, "scale": scale.clamp(max=HALF_MAX).half()}

    def kernel_format(self, dim: int) -> ScalarFormat:
        """See `ScalarFormat`."""
        return _format(self.bits, dim)

    def decode_reference(self, packed: Packed) -> Tensor:
        """See `Codec`."""
        dim = packed.shape[-1]
        levels = upload(normal_levels(self.bits), packed.device)
        x = levels[unpack_bits(packed.tensors["codes"], self.bits, dim)] * packed.tensors["scale"].float().unsqueeze(-1)
        return x @ rotation(dim, device=x.device)


@lru_cache(maxsize=64)
def _format(bits: int, dim: int) -> ScalarFormat:
    return scalar_format("levels", bits, {"codes": "codes", "scale": "scale"}, levels=normal_levels(bits), rotated=dim)


@cache
def normal_levels(bits: int) -> Tensor:
    """Lloyd–Max levels for the normal distribution: (2^bits,) float32, ascending."""
    return lloyd_max(lambda x: torch.exp(-x * x / 2), -9.0, 9.0, 2**bits).float()


@register("scalar", ("scalar:4",))
def _scalar(argument: str) -> Codec:
    if not argument.isdecimal():
        raise ValueError(f"the number of bits must be a whole number, got {argument!r}")
    return Scalar(int(argument))
