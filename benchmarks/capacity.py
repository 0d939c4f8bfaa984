"""Measure how many pairs one matrix holds; see `tessera.lab.evaluation.capacity`.

Example:

    python benchmarks/capacity.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from tessera.evaluation.records import environment
from tessera.files import write_json
from tessera.lab.evaluation.capacity import WIDTHS, capacity, capacity_table, plot_capacity

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=16, help="memories that are averaged")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "capacity.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "images" / "capacity.png")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for part in track(capacity(WIDTHS, options.trials), "storing", len(WIDTHS), console=Console(stderr=True), transient=True):
        rows += part
    write_json(options.json, {"environment": environment(), "trials": options.trials, "rows": rows})
    plot_capacity(rows, options.plot)
    Console().print(capacity_table(rows))
    Console().print(f"Saved {options.json} and {options.plot}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
