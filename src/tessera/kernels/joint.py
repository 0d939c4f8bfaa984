"""The format of vectors coded with a joint codebook, for kernels; made by `tessera.codecs.JointHQMQ`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

from torch import Tensor


@dataclass(frozen=True, eq=False)
class JointFormat:
    """The format of a vector R⁻¹ (scale · codewords); a key's channels are then multiplied by factors and added to means.

    Codes are packed contiguously, `bits` each, one for four numbers: point · 2^permutation_bits + move, the codeword being
    sign[move] · representatives[point][permutation[move]] · step. So kernels, for short, call the number of an orbit's
    representative a point, and that of a signed permutation a move; see `JointCodebook` in `tessera.codecs.codebooks`.

    Attributes:
        bits: width of a code, in bits.
        permutation_bits: how many of them, the lowest, name the signed permutation.
        step: the value of one unit of a representative's integers.
        value_gain: values are multiplied by it.
        representatives: (n, 4) int16.
        permutation: (2^permutation_bits, 4) int64.
        sign: (2^permutation_bits, 4) int64, ±1.
        scales: (256,) float32, the scale for each byte of field "scale".
        group: tokens that share a row of field "centre": int16 words, a half-precision mean of which the low four bits
            hold the exponent of the factor.
        dct: (m, m) float32, and
        signs: (head_dim,) float32: R x is the Kronecker product of `dct` and a Hadamard matrix, times signs · x. Without
            elements: R is the identity.
    """

    bits: int
    permutation_bits: int
    step: float
    value_gain: float
    representatives: Tensor
    permutation: Tensor
    sign: Tensor
    scales: Tensor
    group: int
    dct: Tensor
    signs: Tensor

    #: For each role, the kept fields by the names that kernels use.
    fields: ClassVar[Mapping[Literal["key", "value"], Mapping[str, str]]] = MappingProxyType(
        {role: MappingProxyType({name: name for name in ("codes", "scale", "centre")}) for role in ("key", "value")}
    )
