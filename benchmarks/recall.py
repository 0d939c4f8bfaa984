"""Train and measure all models on associative recall beyond the window; see `tessera.lab.evaluation.recall`.

Each run is saved when it ends, and an interrupted plan resumes.

Example:

    python benchmarks/recall.py
    python benchmarks/recall.py --draw       # the picture again, from the JSON
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from tessera.lab.evaluation.recall import METHODS, full_plan, key, recall, recall_table
from tessera.lab.evaluation.recall_plot import plot_recall

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of models of every method on 16 pairs")
    parser.add_argument("--steps", type=int, default=600, help="steps of training, 32 sequences each")
    parser.add_argument("--jobs", type=int, default=max(1, torch.get_num_threads()), help="models trained at once")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="train only these methods")
    parser.add_argument("--draw", action="store_true", help="only draw the picture from the JSON")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "recall.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "images" / "recall.png")
    options = parser.parse_args()
    jobs = [
        job for job in full_plan(options.seeds, options.steps) if options.methods is None or job["method"] in options.methods
    ]
    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("training")
        parts = recall([] if options.draw else jobs, options.json, options.jobs)
        for rows in parts:
            progress.update(bar, completed=sum(key(job) in map(key, rows) for job in jobs), total=len(jobs))
    plot_recall(rows, options.plot)
    Console().print(recall_table(rows))
    Console().print(f"Saved {options.json} and {options.plot}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
