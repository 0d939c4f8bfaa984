"""Measure how long a Tensor Memory retains a write: the paper's form, each improvement alone, and the default.

A token writes; random tokens follow, one per step; every step reads at the place of that first write. Weights are those of
the initialisation: nothing is trained. Two things are measured:

1. How much of the written content a read retains: the share of its variance that the best linear map recovers, fitted to
   some sequences and tested on others.
2. How large gradients are: the norm of the Jacobian of the read with respect to that content, as a share of its norm right
   after the write. Above 1, later gates amplify it.

Example:

    python benchmarks/retention.py
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from tessera.evaluation.records import environment
from tessera.files import atomic_path
from tessera.tensor_memory import TensorMemory, TensorMemoryConfig

ROOT = Path(__file__).resolve().parent.parent
LAGS = (8, 32, 128, 1024)
DIM = 64
_PAPER = TensorMemoryConfig.paper
SETTINGS: dict[str, TensorMemoryConfig] = {
    "the paper's": _PAPER(),
    "forget bias 3": _PAPER(forget_bias=3.0),
    "forget bias 6": _PAPER(forget_bias=6.0),
    "sigma 0.3": _PAPER(sigma_init=0.3),
    "footprint": _PAPER(update="footprint"),
    "footprint, sigma 0.3": _PAPER(update="footprint", sigma_init=0.3),
    "footprint, nearest cell": _PAPER(update="footprint", write="nearest"),
    "gates from the input": _PAPER(gates="input"),
    "default": TensorMemoryConfig(),
    "default, forget bias 6": TensorMemoryConfig(forget_bias=6.0),
    "default, gates from the input": TensorMemoryConfig(gates="input"),
    "every cell": TensorMemoryConfig(update="all"),
    "every cell, forget bias 6": TensorMemoryConfig(update="all", forget_bias=6.0),
    "every cell, gates from the input": TensorMemoryConfig(update="all", gates="input"),
}


def first_write(memory: TensorMemory, batch: int, steps: int) -> tuple[Tensor, Tensor]:
    """Return what the first token of random sequences writes, and what is read there before each step.

    Returns:
        the content, (batch, channels), with its graph, and the reads, (batch, steps, channels).
    """
    state = memory.initial_state(batch)
    chunks = torch.randn(batch, steps, 1, memory.dim)
    with torch.no_grad():
        writes = memory.writes(chunks, None, memory.coordinates(chunks))
    content = writes.content[:, 0].requires_grad_(torch.is_grad_enabled())
    whole = torch.cat((content.unsqueeze(1), writes.content[:, 1:]), dim=1)
    place = writes.at[:, :1, None].expand(-1, steps, 1, -1)
    reads, _, _ = memory.advance(place, replace(writes, content=whole), state.h, state.c)
    return content, reads[:, :, 0]


@torch.no_grad()
def recovered(config: TensorMemoryConfig, lags: Sequence[int], seeds: int, sequences: int = 384, dim: int = DIM) -> list[float]:
    """Return the share of the written content's variance that a linear map of the read `lags` steps later recovers."""
    shares = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        content, reads = first_write(TensorMemory(config, dim), sequences, max(lags) + 1)
        content = (content - content.mean(0)).double()
        fitted = 2 * sequences // 3
        for lag in lags:
            read = (reads[:, lag] - reads[:, lag].mean(0)).double()
            # Regularised relative to the reads, so that a weak trace counts as far as it can be distinguished.
            read = read / read.square().mean().sqrt().clamp(min=1e-30)
            ridge = 1e-3 * fitted * torch.eye(read.shape[1], dtype=torch.float64)
            gram = read[:fitted].T @ read[:fitted] + ridge
            guess = read[fitted:] @ torch.linalg.solve(gram, read[:fitted].T @ content[:fitted])
            wrong = (content[fitted:] - guess).square().sum() / content[fitted:].square().sum()
            shares.append(max(0.0, 1 - wrong.item()))
    return torch.tensor(shares).view(seeds, -1).mean(0).tolist()


def gradients(config: TensorMemoryConfig, lags: Sequence[int], seeds: int, batch: int = 8, dim: int = DIM) -> list[float]:
    """Return the norm of the Jacobian of a read with respect to a write `lags` steps earlier, relative to one step."""
    squares = torch.zeros(len(lags) + 1, dtype=torch.float64)
    for seed in range(seeds):
        torch.manual_seed(seed)
        content, reads = first_write(TensorMemory(config, dim), batch, max(lags) + 1)
        for i, lag in enumerate((1, *lags)):
            loss = (reads[:, lag] * torch.randn(batch, config.channels)).sum()
            (found,) = torch.autograd.grad(loss, content, retain_graph=True)
            squares[i] += found.double().square().sum()
    return (squares[1:] / squares[0]).sqrt().tolist()


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "retention.json")
    options = parser.parse_args()
    record: dict[str, Any] = {"environment": environment(), "lags": LAGS, "seeds": options.seeds, "rows": []}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("measuring", total=len(SETTINGS))
        for name, config in SETTINGS.items():
            shares = recovered(config, (1, *LAGS), options.seeds)
            row = {"setting": name, "recovered": shares, "gradient": gradients(config, LAGS, options.seeds)}
            record["rows"].append({**row, "config": config.to_dict()})
            progress.advance(bar)
    with atomic_path(options.json) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for title, lags in (("recovered", (1, *LAGS)), ("gradient", LAGS)):
        table = Table("setting", *(f"{lag:,}" for lag in lags), title=f"{title}, by steps after the write")
        for r in record["rows"]:
            table.add_row(r["setting"], *(f"{x:.2g}" for x in r[title]))
        Console().print(table)
    Console().print(f"Saved {options.json}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
