"""The format of vectors coded number by number, for kernels; made by `int`, `scalar`, `q4_0`, `q8_0`, `kivi` and `fp8`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from torch import Tensor

Numbers: TypeAlias = Literal["uniform", "levels", "blocks", "groups", "fp8"]


@dataclass(frozen=True, eq=False)
class ScalarFormat:
    """The format of a vector R⁻¹ (numbers), with one code for each number; codes are packed contiguously, `bits` each.

    Attributes:
        numbers: how a code is decoded:
            "uniform": (code - zero) · scale of the vector;
            "levels": levels[code] · scale of the vector;
            "blocks": ggml's q4_0 or q8_0, by `bits`: blocks of 32 numbers, a half-precision scale and the codes, which
                for q4_0 are those of numbers 0 to 15 in low and of numbers 16 to 31 in high halves of bytes;
            "groups": code · scale + low, both of a channel of 32 tokens of keys, and of 32 channels of a token of values;
            "fp8": float8_e4m3fn, times the scale of the vector if there is one.
        bits: width of a code, in bits.
        zero: the code of 0, for "uniform".
        levels: (2^bits,) float32, for "levels"; else without elements.
        factor: the scale of a vector is to be multiplied by it.
        fields: for each role, the kept fields of the kernels' "codes", "scale" and "low". Scales and lows are in half
            precision.
        dct: (m, m) float32, and
        signs: (head_dim,) float32, of the rotation R, see `JointFormat`.
    """

    numbers: Numbers
    bits: int
    zero: float
    levels: Tensor
    factor: float
    fields: Mapping[Literal["key", "value"], Mapping[str, str]]
    dct: Tensor
    signs: Tensor

    #: The factor of decoded values.
    value_gain = 1.0

    @property
    def number(self) -> int:
        """The index of `numbers` in the C++ kernels."""
        return get_args(Numbers).index(self.numbers)
