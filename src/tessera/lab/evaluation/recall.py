"""Associative recall beyond the window: which attention, trained from scratch, recalls values that have left its window.

Small GPTs of two layers learn to recall pairs over a forced gap (see `associative_recall`). The gap is longer than the reach
of two layers of windows, so a window can only be at chance. Every row is one model: accuracy at the gap of training and at
others, and the bytes of its state at the length of the training sequences.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from tessera.lab.evaluation.jobs import resume
from tessera.lab.tasks.associative_recall import Recall
from tessera.lab.training.recall_training import GAPS, RecallConfig, train_recall
from tessera.tensor_cache import TensorCacheConfig

WINDOW, LAYERS, HEADS = 16, 2, 2

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "window": (f"window:{WINDOW}", {}),
    "window + sinks": (f"sink:4 + window:{WINDOW}", {}),
    "Infini-attention": (f"infini:{WINDOW}", {}),
    "Tensor Cache, delta": (f"window:{WINDOW} + tc", {}),
    "Tensor Cache, outer": (f"window:{WINDOW} + tc", {"rule": "outer"}),
    "Tensor Cache, delta, rotary": (f"window:{WINDOW} + tc", {"rotary": True}),
    "Tensor Cache, the paper's setting": (f"window:{WINDOW} + tc", {"paper": True}),
}
"""Name -> attention and options of the memory."""

Job = dict[str, Any]
"""What tells one run from another: ``method``, ``pairs``, ``dim``, ``rewrites``, ``steps``, ``seed``; and where they are not
those of the full plan ``gap`` and ``symbols``, the number of keys and of values."""


def full_plan(seeds: int = 3, steps: int = 600) -> list[Job]:
    """Return all runs: every method on 16 pairs; most of them on more pairs, narrower heads, and rewritten keys."""
    base = {"pairs": 16, "dim": 64, "rewrites": 0, "steps": steps}
    some = ("dense", "window + sinks", "Infini-attention", "Tensor Cache, outer", "Tensor Cache, delta")
    plan: list[tuple[dict[str, int], Iterable[str]]] = [({}, METHODS)]
    plan += [(change, some) for change in ({"rewrites": 8}, {"dim": 32}, {"dim": 16}, {"pairs": 32}, {"pairs": 64})]
    # Seed by seed, so that an interrupted plan has compared all methods.
    return [{**base, **change, "method": m, "seed": seed} for seed in range(seeds) for change, names in plan for m in names]


QUICK_METHODS = ("dense", "window", "Infini-attention", "Tensor Cache, delta")


def quick_plan(methods: Sequence[str] = QUICK_METHODS, seeds: int = 1, **task: int) -> list[Job]:
    """Return a small version of the task that is learned in seconds: few pairs of few symbols.

    Args:
        methods: names from `METHODS`.
        seeds: models of each.
        task: fields of a `Job` to change.
    """
    base = {"pairs": 4, "dim": 64, "rewrites": 0, "steps": 300, "gap": 40, "symbols": 16, **task}
    return [{**base, "method": method, "seed": seed} for seed in range(seeds) for method in methods]


def config_of(job: Job) -> RecallConfig:
    """Return the run of a job.

    Raises:
        ValueError: for an unknown method or an invalid task.
    """
    if job["method"] not in METHODS:
        raise ValueError(f"no method {job['method']!r}; there are {', '.join(METHODS)}")
    attention, options = METHODS[job["method"]]
    memory: dict[str, Any] | None = options or None
    if options.get("paper"):
        memory = {n: v for n, v in TensorCacheConfig.paper().to_dict().items() if n not in ("window", "sink")}
    symbols = job.get("symbols", 64)
    task = Recall(
        pairs=job["pairs"],
        gap=job.get("gap", 64),
        rewrites=job["rewrites"],
        keys=max(symbols, job["pairs"]),
        values=symbols,
    )
    return RecallConfig(
        task, attention, memory, dim=job["dim"], layers=LAYERS, heads=HEADS, steps=job["steps"], seed=job["seed"]
    )


def run(job: Job) -> dict[str, Any]:
    """Train one model and measure it; returns a row."""
    config = config_of(job)
    gap = config.task.gap
    with tempfile.TemporaryDirectory() as folder:
        gaps = GAPS if "gap" not in job else (0, gap // 2, 2 * gap, 4 * gap)
        return {**job, **train_recall(config, Path(folder), gaps=gaps, show=False)}


def key(job: Job) -> tuple[Any, ...]:
    """Return the fields that identify a run."""
    names = ("method", "pairs", "dim", "rewrites", "steps", "seed")
    return (*(job[name] for name in names), job.get("gap", 64), job.get("symbols", 64))


def recall(jobs: Sequence[Job], path: Path, processes: int = 1) -> Iterator[list[dict[str, Any]]]:
    """Run what is not in a file yet; yields all rows of the file once, and again after each run, when it is written.

    Args:
        jobs: jobs that `full_plan` or `quick_plan` made.
        path: path of the JSON; a plan that was cut short goes on where it was.
        processes: number of models trained at once.

    Raises:
        ValueError: for an invalid job, before anything is run, or a file that holds something else.
    """
    for job in jobs:
        config_of(job)
    return resume(jobs, path, run, key, {"window": WINDOW, "layers": LAYERS, "heads": HEADS}, processes)


def recall_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Make the table, with a row for each model."""
    table = Table("method", "pairs", "d", "gap", "rewritten", "seed", "accuracy", "KiB of state")
    for row in sorted(rows, key=key):
        cells = (row["method"], row["pairs"], row["dim"], row.get("gap", 64), row["rewrites"], row["seed"])
        table.add_row(*map(str, cells), f"{row['accuracy']:.3f}", f"{row['state_bytes'] / 1024:.0f}")
    return table
