"""Train and measure on all tasks that need a memory; see `tessera.lab.evaluation.diagnostics`.

Each run is saved when it ends, and an interrupted plan resumes. The whole plan takes hours on a CPU.

Example:

    python benchmarks/diagnostics.py
    python benchmarks/diagnostics.py --seeds 1 --steps 300 --parts kinds settings
    python benchmarks/diagnostics.py --draw       # the picture again, from the JSON
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from tessera.lab.evaluation.diagnostics import PARTS, diagnostics, diagnostics_tables, full_plan, key
from tessera.lab.evaluation.diagnostics_plot import plot_diagnostics

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="models of each row")
    parser.add_argument("--steps", type=int, default=1000, help="steps of training, 32 sequences each")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="parts of the plan to run")
    parser.add_argument("--jobs", type=int, default=max(1, torch.get_num_threads()), help="models trained at once")
    parser.add_argument("--draw", action="store_true", help="only draw the picture from the JSON")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "diagnostics.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "images" / "diagnostics.png")
    options = parser.parse_args()
    jobs = [] if options.draw else full_plan(options.seeds, options.steps, options.parts)
    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("training")
        for rows in diagnostics(jobs, options.json, options.jobs):
            progress.update(bar, completed=sum(key(job) in map(key, rows) for job in jobs), total=len(jobs))
    plot_diagnostics(rows, options.plot)
    for table in diagnostics_tables(rows):
        Console().print(table)
    Console().print(f"Saved {options.json} and {options.plot}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
