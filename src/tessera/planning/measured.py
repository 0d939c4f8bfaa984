"""The errors of codecs that were measured on a pretrained model; `benchmarks/plan_errors.py` writes the table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

#: Where the table is.
FILE = Path(__file__).with_name("measured.json")
#: Bits per element that are worth a larger error.
GAIN = 0.25


@dataclass(frozen=True)
class Measured:
    """What was measured of one codec.

    Attributes:
        codec: its spec.
        bits: kept per element, everything counted.
        kl: mean KL divergence of the model's predictions from the exact ones, in nats a token.
        kl_error: standard error of that.
    """

    codec: str
    bits: float
    kl: float
    kl_error: float


@cache
def measured() -> Mapping[str, Measured]:
    """What was measured of each codec, by its spec, the smallest KL first."""
    rows = json.loads(FILE.read_text(encoding="utf-8"))["codecs"]
    return {row["codec"]: Measured(**row) for row in rows}


@cache
def source() -> str:
    """What it was measured on, in a few words."""
    found = json.loads(FILE.read_text(encoding="utf-8"))
    return f"{found['model']}, {found['tokens']:,} tokens of {found['text']}"


def frontier() -> tuple[str, ...]:
    """The codecs worth their error: each has fewer bits, by `GAIN`, than all of a smaller KL; the smallest KL first."""
    found: list[Measured] = []
    for row in sorted(measured().values(), key=lambda row: (row.kl, row.bits)):
        if not found or row.bits <= found[-1].bits - GAIN:
            found.append(row)
    return tuple(row.codec for row in found)
