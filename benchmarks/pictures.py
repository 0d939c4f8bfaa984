"""Train a small ViT, with a Tensor Memory and without, to classify handwritten digits and to fill in hidden patches.

Attention sees the whole picture, so a memory is not needed; the benchmark shows whether it does harm.

Example:

    python benchmarks/pictures.py
    python benchmarks/pictures.py --seeds 1 --steps 20    # to see that it runs
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tessera.cli.quiet import quiet
from tessera.lab.evaluation.jobs import Job, Row, resume
from tessera.lab.tasks.digits import Digits
from tessera.lab.training.vision import VisionConfig, train_vision
from tessera.tensor_memory import TensorMemoryConfig

ROOT = Path(__file__).resolve().parent.parent
#: A two-dimensional memory, as pictures are.
GRID = (8, 8)
ARMS: dict[str, TensorMemoryConfig | None] = {
    "without a memory": None,
    "with a memory": TensorMemoryConfig(grid=GRID),
    "with one whose patches are anchored": TensorMemoryConfig(grid=GRID, anchored=True),
    "with the paper's": TensorMemoryConfig.paper(grid=GRID),
}
ASKED = ("label", "pixels")


def run(job: Job) -> Row:
    """Train one model and measure it."""
    memory = ARMS[job["arm"]]
    config = VisionConfig(memory=None if memory is None else memory.to_dict(), steps=job["steps"], seed=job["seed"])
    with tempfile.TemporaryDirectory() as folder:
        found = train_vision(config, Digits(job["ask"]), Path(folder), "image", show=False)
    return {**job, **{name: found[name] for name in ("score", "chance", "parameters")}}


def main() -> int:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help="steps of training, 64 pictures each")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "pictures.json")
    options = parser.parse_args()
    quiet()
    names = ("ask", "arm", "seed", "steps")
    jobs = [
        dict(zip(names, (ask, arm, seed, options.steps), strict=True))
        for seed in range(options.seeds)
        for ask in ASKED
        for arm in ARMS
    ]
    rows: list[Row] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("training", total=len(jobs))
        for rows in resume(jobs, options.json, run, lambda job: tuple(job[name] for name in names), {}):
            progress.update(bar, completed=len(rows))
    table = Table("asked", "model", "seed", "score")
    for r in rows:
        table.add_row(r["ask"], r["arm"], str(r["seed"]), f"{r['score']:.3f}")
    Console().print(table)
    Console().print(f"Saved {options.json}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
