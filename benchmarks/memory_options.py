"""Compare options of a Tensor Cache attached to the demo model after a short training.

Every row is a memory trained by `tessera train memory` with one option changed: the loss beyond the window on held-out modules,
by position in the sequence. Each run is saved when it ends, and an interrupted plan resumes.

Example:

    python benchmarks/memory_options.py
    python benchmarks/memory_options.py --steps 2 --json /tmp/x.json   # to see that it runs
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import tessera
from stretches import measure
from tessera.evaluation import load
from tessera.evaluation.loading import encode, windows
from tessera.lab.evaluation.jobs import Job, Row, resume
from tessera.lab.training.lm import prepare_lm
from tessera.lab.training.memory import train_memory
from tessera.lab.training.schedule import LoopConfig, Phase
from tessera.models import heldout_text
from tessera.tensor_cache import TensorCacheConfig

ROOT = Path(__file__).resolve().parent.parent
WINDOW, SINK = 256, 4
SEQUENCE = 8 * WINDOW
EDGES = (1, WINDOW, 2 * WINDOW, 4 * WINDOW, SEQUENCE)
#: Sequences per training step, and held-out sequences.
BATCH, MEASURED = 4, 16
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "outer": {"rule": "outer"},
    "with the rotary phase": {"rotary": True},
    "raw queries": {"normalise_queries": False},
    "rates of each token": {"rates": "token"},
    "gate of each token": {"gate": "token"},
    "4 slots": {"slots": 4},
}


def run(job: Job, folder: Path) -> Row:
    """Train one memory and measure it; with no steps its output is zero, as at initialisation."""
    source = load()
    torch.manual_seed(0)
    tessera.attach(source.model, TensorCacheConfig(window=WINDOW, sink=SINK, **OPTIONS[job["option"]]))
    ids = windows(encode(source.tokenizer, heldout_text()), SEQUENCE, MEASURED, source.tokenizer.bos_token_id)
    if job["steps"]:
        loop = LoopConfig(
            phases=(Phase(1.0, SEQUENCE, BATCH),),
            steps=job["steps"],
            mixed_precision="bf16",
            muon_lr=2e-3,
            adamw_lr=2e-3,
            warmup_steps=min(20, job["steps"] // 5),
            checkpoint_seconds=1e9,
        )
        with tempfile.TemporaryDirectory() as out:
            train_memory(source.model, prepare_lm(None, [], folder)[1].sample, loop, Path(out))
    return {**job, **measure(source.model.eval(), ids, EDGES, 4)}


def key(job: Job) -> tuple[Any, ...]:
    """Return what identifies a run."""
    return job["option"], job["steps"]


def main() -> int:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help=f"steps of training, {BATCH} sequences each")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "memory_options", help="folder for the tokens and runs")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "memory_options.json")
    options = parser.parse_args()
    plan = [{"option": "default", "steps": 0}, *({"option": name, "steps": options.steps} for name in OPTIONS)]
    rows: list[Row] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("options", total=len(plan))
        for rows in resume(plan, options.json, partial(run, folder=options.folder), key, {"window": WINDOW, "edges": EDGES}):
            progress.update(bar, completed=len(rows))
    table = Table("option", "steps", *(f"{a:,}–{b:,}" for a, b in itertools.pairwise(EDGES)), "beyond the window")
    for row in rows:
        table.add_row(row["option"], str(row["steps"]), *(f"{loss:.4f}" for loss in (*row["losses"], row["beyond"])))
    Console().print(table)
    Console().print(f"Saved {options.json}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
