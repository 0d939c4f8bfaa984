"""Eight-bit floating point, e4m3: ``fp8``, as engines store caches by default, and ``fp8:scaled``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from tessera.codecs.base import Codec, Layout, Packed, Role
from tessera.codecs.registry import register
from tessera.codecs.scalar_format import scalar_format
from tessera.kernels.scalars import ScalarFormat

HALF_MAX = 65504.0
#: Largest number of e4m3.
FP8_MAX = 448.0


class FP8(Codec):
    """A cast to float8_e4m3fn that saturates at ±448.

    True bits per element: 8, and 16/d more with `scaled`.

    Args:
        scaled: divide each vector first so that its largest magnitude, kept in half precision, becomes 448. Without it, it
            is vLLM's ``fp8`` cache with its default scale of 1.
    """

    fields: Mapping[str, Layout] = {"codes": "token", "most": "token"}

    def __init__(self, *, scaled: bool = False) -> None:
        self.scaled = scaled
        self.spec = "fp8:scaled" if scaled else "fp8"

    def check(self, packed: Packed) -> None:
        """See `Codec`."""
        super().check(packed)
        if bool((packed.tensors["codes"] & 127 == 127).any()):
            raise ValueError(f"field 'codes' of {packed.describe()} is damaged: it has numbers that are not finite")

    def _encode(self, x: Tensor, role: Role, layer: int) -> dict[str, Tensor]:
        tensors = {}
        if self.scaled:
            most = x.abs().amax(-1).clamp(max=HALF_MAX).half()
            x = x * (FP8_MAX / most.float().clamp(min=2.0**-24)).unsqueeze(-1)
            tensors["most"] = most
        # Kept as bytes: most tensor operations do not take float8.
        codes = x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
        return {"codes": codes, **tensors}

    def kernel_format(self, dim: int) -> ScalarFormat:
        """See `ScalarFormat`."""
        return _format(self.scaled)

    def decode_reference(self, packed: Packed) -> Tensor:
        """See `Codec`."""
        x = packed.tensors["codes"].contiguous().view(torch.float8_e4m3fn).float()
        return x * (packed.tensors["most"].float() / FP8_MAX).unsqueeze(-1) if self.scaled else x


@cache
def _format(scaled: bool) -> ScalarFormat:
    fields = {"codes": "codes", "scale": "most"} if scaled else {"codes": "codes"}
    return scalar_format("fp8", 8, fields, factor=1 / FP8_MAX if scaled else 1.0)


@register("fp8", ("fp8", "fp8:scaled"))
def _fp8(argument: str) -> Codec:
    if argument not in ("", "scaled"):
        raise ValueError(f"after the colon there can only be 'scaled', got {argument!r}")
    return FP8(scaled=argument == "scaled")
