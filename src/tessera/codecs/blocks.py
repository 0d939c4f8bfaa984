"""llama.cpp's block formats ``q4_0`` and ``q8_0``, byte for byte (ggml, `block_q4_0` and `block_q8_0`).

A block is 32 numbers: a half-precision scale d, then the codes. Encoding uses d before it is rounded, as ggml's reference does.
Vectors are rotated first, as llama.cpp does for its cache; ``q4_0:norot`` omits that. The rotation is ours (`rotation`), which
works for any head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from tessera.codecs.base import Codec, Layout, Packed, Role
from tessera.codecs.registry import register
from tessera.codecs.rotation import rotation
from tessera.codecs.scalar_format import scalar_format
from tessera.kernels import dispatch
from tessera.kernels.scalars import ScalarFormat

BLOCK = 32
HALF_MAX = 65504.0


class Blocks(Codec):
    """Blocks of 32 numbers with one scale each.

    - q4_0: d = -m/8, m the number of largest magnitude with its sign; q = min(15, ⌊x/d + 8.5⌋); x̂ = (q - 8)·d;
    - q8_0: d = max|x| / 127; q = x/d rounded, halves away from zero; x̂ = q·d.

    True bits per element: 4.5 and 8.5 where 32 divides head_dim; else a vector is padded with zeros, which count. A d beyond
        the range of half precision saturates.

    Args:
        bits: 4 or 8.
        rotate: rotate vectors first.
    """

    fields: Mapping[str, Layout] = {"blocks": "token"}

    def __init__(self, bits: int = 4, *, rotate: bool = True) -> None:
        if bits not in (4, 8):
            raise ValueError(f"there are q4_0 and q8_0, not q{bits}_0")
        self.bits, self.rotate = bits, rotate
        self.spec = f"q{bits}_0" + ("" if rotate else ":norot")

    def kept(self, heads: int, dim: int, role: Role) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See `Codec`."""
        return {"blocks": ((-(-dim // BLOCK), 2 + BLOCK * self.bits // 8), torch.uint8)}

    def check(self, packed: Packed) -> None:
        """See `Codec`."""
        if not packed.tensors["blocks"][..., :2].contiguous().view(torch.float16).isfinite().all():
            raise ValueError(f"field 'blocks' of {packed.describe()} is damaged: it has scales that are not finite")

    def _encode(self, x: Tensor, role: Role, layer: int) -> dict[str, Tensor]:
        if self.rotate:
            x = x @ rotation(x.shape[-1], device=x.device).T
        x = pad(x, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))  # (b, h, t, n, 32)
        biggest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
        d = biggest / -8 if self.bits == 4 else biggest.abs() / 127
        half = d.clamp(-HALF_MAX, HALF_MAX).half()
        # A block whose d rounds to zero decodes to zero whatever its codes are, and 1/d may not exist.
        inverse = torch.where(half != 0, 1 / d, 0.0)
        return {"blocks": dispatch.pack_blocks(x, inverse, half, self.bits)}

    def kernel_format(self, dim: int) -> ScalarFormat:
        """See `ScalarFormat`."""
        return _format(self.bits, dim if self.rotate else 0)

    def decode_reference(self, packed: Packed) -> Tensor:
        """See `Codec`."""
        dim, blocks = packed.shape[-1], packed.tensors["blocks"]
        d = blocks[..., :2].contiguous().view(torch.float16).float()
        codes = blocks[..., 2:].contiguous()
        if self.bits == 4:
            q = torch.cat((codes & 15, codes >> 4), -1).float() - 8
        else:
            q = codes.view(torch.int8).float()
        x = (q * d).flatten(-2)[..., :dim]
        return x @ rotation(dim, device=x.device) if self.rotate else x


@lru_cache(maxsize=64)
def _format(bits: int, rotated: int) -> ScalarFormat:
    return scalar_format("blocks", bits, {"codes": "blocks"}, rotated=rotated)


def _rotate(argument: str) -> bool:
    if argument not in ("", "norot"):
        raise ValueError(f"after the colon there can only be 'norot', got {argument!r}")
    return not argument


@register("q4_0", ("q4_0", "q4_0:norot"))
def _q4_0(argument: str) -> Codec:
    return Blocks(4, rotate=_rotate(argument))


@register("q8_0", ("q8_0",))
def _q8_0(argument: str) -> Codec:
    return Blocks(8, rotate=_rotate(argument))
