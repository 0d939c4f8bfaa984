"""The format of vectors coded by direction and radius, for kernels; made by `tessera.codecs.HQMQ`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

from torch import Tensor


@dataclass(frozen=True, eq=False)
class ProductFormat:
    """The format of a vector R⁻¹ (scale · level · direction) for every four numbers, except those kept in half precision.

    Codes are packed contiguously, `bits` each: direction · 2^radius_bits + level. Field "scale" is in half precision;
    a bit of "flags" is set for four numbers that are rows of "kept" instead.

    Attributes:
        bits: width of a code, in bits.
        radius_bits: how many of them, the lowest, are the level.
        levels: (2^radius_bits,) float32, of the radius as a share of the scale.
        directions: (kv_heads, role, layer) -> unit quaternions (kv_heads or 1, n, 4) float32, of each head or of all.
        dct: (m, m) float32, and
        signs: (head_dim,) float32, of the rotation R, see `JointFormat`.
    """

    bits: int
    radius_bits: int
    levels: Tensor
    directions: Callable[[int, Literal["key", "value"], int], Tensor]
    dct: Tensor
    signs: Tensor

    #: The factor of decoded values.
    value_gain = 1.0
    #: For each role, the kept fields by the names that kernels use.
    fields: ClassVar[Mapping[Literal["key", "value"], Mapping[str, str]]] = MappingProxyType(
        {role: MappingProxyType({name: name for name in ("codes", "scale", "flags", "kept")}) for role in ("key", "value")}
    )
