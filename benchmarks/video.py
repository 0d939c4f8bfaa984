"""Train small ViTs to name the digit hidden behind a bar, and test them on clips and on streams eight times as long.

Every row is a small ViT, trained from scratch on clips of 16 frames, whose patches attend to their own frame, the newest
four, or the whole clip; with a Tensor Memory and without. Streams are read frame by frame with a persistent state, once
more with every frame shown four times, so that digits are hidden for longer than in training and than a window sees back, and
with a memory also with its reads switched off. Then the same where digits stay behind the bar for longer than a window sees
back, in training too.

Each run is saved when it ends, and an interrupted plan resumes.

Example:

    python benchmarks/video.py
    python benchmarks/video.py --seeds 1 --steps 20    # to see that it runs
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Generator

from tessera.cli.quiet import quiet
from tessera.lab.evaluation.jobs import Job, Row, resume
from tessera.lab.models import ViT
from tessera.lab.tasks.moving_digits import IGNORED, MovingDigits
from tessera.lab.training.vision import VisionConfig, train_vision
from tessera.tensor_memory import TensorMemoryConfig

ROOT = Path(__file__).resolve().parent.parent
STREAMS, FRAMES = 128, 128
#: Stretches of a stream, in frames.
EDGES = (0, 16, 32, 64, FRAMES)
#: Repetitions of each frame of a slow stream.
SLOW = 4
#: A two-dimensional memory, as pictures are.
GRID = (8, 8)
#: Name -> attention and memory.
ARMS: dict[str, tuple[str, TensorMemoryConfig | None]] = {
    "frame": ("frame", None),
    "frame, memory": ("frame", TensorMemoryConfig(grid=GRID)),
    "frame, memory that updates every cell": ("frame", TensorMemoryConfig(grid=GRID, update="all")),
    "frame, the paper's memory": ("frame", TensorMemoryConfig.paper(grid=GRID)),
    "window:4": ("window:4", None),
    "whole clip": ("all", None),
}
#: Frames per clip, frames for which a digit stays behind the bar, and the arms.
PLAN: tuple[tuple[int, int, tuple[str, ...]], ...] = (
    (16, 1, tuple(ARMS)),
    (24, 6, ("frame, memory", "frame, memory that updates every cell", "window:4")),
)


@torch.no_grad()
def by_stretch(model: Any, task: MovingDigits, count: int, times: int = 1) -> list[float]:
    """Return the accuracy in each stretch of long streams whose frames are repeated; the last answer to a frame counts."""
    clips, targets = task.sample(count, Generator().manual_seed(1), held_out=True)
    state, said = None, []
    for frame in clips.split(1, dim=1):
        for _ in range(times):
            output = model(frame, state)
            state = output.state
        said.append(output.logits.argmax(-1))
    right, asked = torch.cat(said, dim=1) == targets, targets != IGNORED
    return [float(right[:, a:b][asked[:, a:b]].float().mean()) for a, b in itertools.pairwise(EDGES) if a < task.frames]


def run(job: Job) -> Row:
    """Train one model and measure it."""
    attention, memory = ARMS[job["arm"]]
    fields = None if memory is None else memory.to_dict()
    config = VisionConfig(attention=attention, memory=fields, batch=16, steps=job["steps"], seed=job["seed"])
    task, stream = MovingDigits(job["frames"], stay=job["stay"]), MovingDigits(FRAMES, stay=job["stay"])
    with tempfile.TemporaryDirectory() as folder:
        found = train_vision(config, task, Path(folder), "video", show=False)
        model: Any = ViT.from_pretrained(Path(folder) / "model").eval()
    row = {**job, "chance": found["chance"], "parameters": found["parameters"], "clips": found["score"]}
    if attention != "all":
        row["streams"] = by_stretch(model, stream, STREAMS)
        row["slow"] = by_stretch(model, stream, STREAMS, SLOW)
    if memory is not None:
        row["gates"] = [float(layer.gate_logit.detach().sigmoid()) for layer in model.memory_layers.values()]
        for layer in model.memory_layers.values():
            layer.reads = False
        row["reads off"] = by_stretch(model, stream, STREAMS)
    return row


def main() -> int:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=800, help="steps of training, 16 clips each")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "video.json")
    options = parser.parse_args()
    quiet()
    jobs = [
        {"arm": arm, "frames": frames, "stay": stay, "seed": seed, "steps": options.steps}
        for seed in range(options.seeds)
        for frames, stay, arms in PLAN
        for arm in arms
    ]
    names = ("arm", "frames", "stay", "seed", "steps")
    rows: list[Row] = []
    about = {"edges": EDGES}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("training", total=len(jobs))
        for rows in resume(jobs, options.json, run, lambda job: tuple(job[name] for name in names), about):
            progress.update(bar, completed=len(rows))
    table = Table(
        "attention", "stay", "seed", "clips", *(f"frames {a + 1}-{b}" for a, b in itertools.pairwise(EDGES)), "reads off"
    )
    for r in rows:
        streams = [f"{x:.3f}" for x in r.get("streams", [])] or [""] * (len(EDGES) - 1)
        off = f"{r['reads off'][-1]:.3f}" if "reads off" in r else ""
        table.add_row(r["arm"], str(r["stay"]), str(r["seed"]), f"{r['clips']:.3f}", *streams, off)
    Console().print(table)
    Console().print(f"Saved {options.json}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
