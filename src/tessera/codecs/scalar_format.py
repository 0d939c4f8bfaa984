"""Construction of the formats that kernels read for codecs that code number by number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from tessera.codecs.rotation import rotation_factors
from tessera.kernels.scalars import Numbers, ScalarFormat


def scalar_format(
    numbers: Numbers,
    bits: int,
    fields: Mapping[str, str],
    values: Mapping[str, str] | None = None,
    *,
    zero: float = 0.0,
    levels: Tensor | None = None,
    factor: float = 1.0,
    rotated: int = 0,
) -> ScalarFormat:
    """A `ScalarFormat`.

    Args:
        numbers, bits, zero, levels, factor: as there.
        fields: kept fields of keys, and of values too unless they have
        values: kept fields of values.
        rotated: numbers of a vector if it is rotated, else 0.
    """
    none = torch.zeros(0, dtype=torch.float32)
    dct, signs = rotation_factors(rotated) if rotated else (torch.ones(1, 1, dtype=torch.float32), none)
    by_role: Mapping[Literal["key", "value"], Mapping[str, str]] = {
        "key": fields,
        "value": fields if values is None else values,
    }
    return ScalarFormat(numbers, bits, zero, none if levels is None else levels, factor, by_role, dct, signs)
