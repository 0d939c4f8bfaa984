"""Restrict PyTorch, its libraries and Tessera's kernels to an instruction set that the processor exceeds.

A processor with AVX-512 then does what one without would: the choice of kernels is made by the same code, from the variables
below instead of from the processor. Clock rates, caches and memory remain those of the machine, so results name it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from tessera.evaluation.records import environment

#: Environment variables by instruction set: of ATen, oneDNN, MKL and Tessera.
VARIABLES: Mapping[str, Mapping[str, str]] = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "TESSERA_BACKEND": "cpu:avx2",
    }
}


def restrict(name: str | None) -> None:
    """Start this script again with the variables of an instruction set, unless they are set; libraries read them when imported.

    Args:
        name: a key of `VARIABLES`; None restricts nothing.
    """
    wanted = VARIABLES[name] if name else {}
    if all(os.environ.get(variable) == value for variable, value in wanted.items()):
        return
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})


def environment_within(name: str | None) -> dict[str, Any]:
    """Return what a record says of machine and software, and the instruction set to which they are restricted, if any."""
    return {**environment(), **({"restricted_to": name} if name else {})}
