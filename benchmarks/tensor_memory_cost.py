"""Time a Tensor Memory's fast forms against the plain loop that defines it, and measure its bytes of state.

Forward, and forward with backward, at the two sizes of the paper's models, for the paper's setting, this project's, and gates
from the input alone. The time of a step includes everything: the networks for addresses and contents, the recurrence, the
output projection.

Example:

    python benchmarks/tensor_memory_cost.py
    python benchmarks/tensor_memory_cost.py --repeats 3   # half a minute
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from tessera.evaluation.records import environment
from tessera.files import atomic_path
from tessera.kernels import cpu
from tessera.tensor_memory import TensorMemory, TensorMemoryConfig
from timing import medians

ROOT = Path(__file__).resolve().parent.parent
#: Batch, tokens, width of a token, and size of the memory.
SIZES: tuple[tuple[int, int, int, dict[str, Any]], ...] = (
    (2, 1024, 256, {"channels": 32, "grid": (8, 8, 8), "chunk": 16}),
    (8, 128, 96, {"channels": 16, "grid": (6, 6, 6), "chunk": 1}),
)
SETTINGS: dict[str, Callable[..., TensorMemoryConfig]] = {
    "the paper's": TensorMemoryConfig.paper,
    "default": TensorMemoryConfig,
    "gates from the input": partial(TensorMemoryConfig, gates="input"),
}
PLAIN = "plain loop"


def forms() -> dict[str, str | None]:
    """Return the backends that can compute it, by name."""
    return {PLAIN: None, "PyTorch": "reference", **({} if cpu.MISSING else {"C++": "cpu"})}


def rows(batch: int, tokens: int, dim: int, size: dict[str, Any], setting: str, repeats: int) -> list[dict[str, Any]]:
    """Measure all forms of one setting at one size."""
    torch.manual_seed(0)
    memory = TensorMemory(SETTINGS[setting](**size), dim)
    x = torch.randn(batch, tokens, dim, requires_grad=True)
    leaves = [x, *memory.parameters()]
    runs: dict[str, Callable[[], object]] = {}
    for name, backend in forms().items():

        def out(name: str = name, backend: str | None = backend) -> Tensor:
            return memory.reference(x)[0] if name == PLAIN else memory(x, backend=backend)[0]

        def forward(out: Callable[[], Tensor] = out) -> Tensor:
            with torch.no_grad():
                return out()

        def both(out: Callable[[], Tensor] = out) -> Any:
            return torch.autograd.grad(out().sum(), leaves, allow_unused=True)

        runs[f"{name}/forward"], runs[f"{name}/backward"] = forward, both
    seconds = medians(runs, repeats)
    shape = {"batch": batch, "tokens": tokens, "dim": dim, **size}
    return [
        {
            **shape,
            "setting": setting,
            "form": name,
            "way": way,
            "ms": 1e3 * seconds[f"{name}/{way}"],
            "times": seconds[f"{PLAIN}/{way}"] / seconds[f"{name}/{way}"],
        }
        for way in ("forward", "backward")
        for name in forms()
    ]


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="number of calls, of which the median is taken")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "tensor_memory_cost.json")
    options = parser.parse_args()
    record: dict[str, Any] = {"environment": environment(), "rows": []}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("measuring", total=len(SIZES) * len(SETTINGS))
        for batch, tokens, dim, size in SIZES:
            for setting in SETTINGS:
                record["rows"] += rows(batch, tokens, dim, size, setting, options.repeats)
                progress.advance(bar)
    with atomic_path(options.json) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    table = Table("batch", "tokens", "cells", "setting", "form", "way", "ms", "times faster")
    for r in record["rows"]:
        cells = "x".join(map(str, (r["channels"], *r["grid"])))
        shape = (str(r["batch"]), str(r["tokens"]), cells)
        table.add_row(*shape, r["setting"], r["form"], r["way"], f"{r['ms']:.1f}", f"{r['times']:.1f}")
    Console().print(table)
    Console().print(f"Saved {options.json}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
