"""A positive scale in one byte: eight steps an octave over thirty-two octaves.

A scale need not be exact if the vector is divided by the scale as it will be decoded: a mismatch of at most 4.4 % between the
codebook and the vector raises the error by 0.3 %, and a byte less per vector is 1/8 bit per element at head_dim 64.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Code of the scale 1. Code 0 means that the vector is zero.
ONE = 128
STEPS = 8


def to_byte(scale: Tensor) -> Tensor:
    """Nearest code of scale >= 0, saturating at 2^±15.9; 0 for 0: float32 -> uint8."""
    code = (scale.clamp(min=1e-30).log2() * STEPS).round() + ONE
    return torch.where(scale > 0, code.clamp(1, 255), 0).to(torch.uint8)


def from_byte(code: Tensor) -> Tensor:
    """uint8 -> float32."""
    return torch.where(code > 0, torch.exp2((code.float() - ONE) / STEPS), 0.0)
