"""The codecs' errors, measured on a pretrained model; `benchmarks/plan_errors.py` writes the table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

#: The file of the table.
FILE = Path(__file__).with_name("measured.json")
#: Smallest saving in bits per element for which a codec with a larger error is listed.
GAIN = 0.25


@dataclass(frozen=True)
class Measured:
    """The measurements of one codec.

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
    """Return the measurements of each codec by its spec, the smallest KL first."""
    rows = json.loads(FILE.read_text(encoding="utf-8"))["codecs"]
    return {row["codec"]: Measured(**row) for row in rows}


@cache
def source() -> str:
    """Describe the model and text of the measurement in a few words."""
    found = json.loads(FILE.read_text(encoding="utf-8"))
    return f"{found['model']}, {found['tokens']:,} tokens of {found['text']}"


def frontier() -> tuple[str, ...]:
    """List the codecs on the frontier: each has fewer bits, by `GAIN`, than all of a smaller KL; the smallest KL first."""
    found: list[Measured] = []
    for row in sorted(measured().values(), key=lambda row: (row.kl, row.bits)):
        if not found or row.bits <= found[-1].bits - GAIN:
            found.append(row)
    return tuple(row.codec for row in found)
