"""Options shared by several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Batch = Annotated[int, typer.Option(help="Sequences, pictures or clips per step, over all processes.", min=1)]
Gap = Annotated[int, typer.Option(help="Tokens of filler between the last pair and the first question.")]
HeadDim = Annotated[int, typer.Option(help="Width of a head.")]
Heads = Annotated[int, typer.Option(help="Heads of attention.")]
Hidden = Annotated[int, typer.Option(help="Width of the residual stream.")]
Jobs = Annotated[int | None, typer.Option(help="Models trained at once.  [default: one per core]", min=1)]
Layers = Annotated[int, typer.Option(help="Number of layers.")]
MicroBatch = Annotated[int | None, typer.Option(help="Sequences per forward pass.  [default: 4096 tokens in all]", min=1)]
Minutes = Annotated[float | None, typer.Option(help="Train for this many minutes instead (default: 20).", min=0.01)]
Out = Annotated[Path, typer.Option(help="Folder for the JSON and the picture.")]
Pairs = Annotated[int, typer.Option(help="Number of keys of a sequence, each with a value.")]
Precision = Annotated[str, typer.Option(help="Mixed precision: bf16 (autocast) or no.")]
Resume = Annotated[
    bool, typer.Option("--resume/--fresh", help="Continue from the newest checkpoint, or delete the run and start over.")
]
Rewrites = Annotated[int, typer.Option(help="Number of keys that get another value.")]
Rule = Annotated[str | None, typer.Option(help="Update rule of a memory: outer, delta or wedge.  [default: delta]")]
Seed = Annotated[int, typer.Option(help="Seed of the weights and of the order of the data.")]
Steps = Annotated[int, typer.Option(help="Steps of training.", min=1)]
StepsOrMinutes = Annotated[int | None, typer.Option(help="Train for this many steps.", min=1)]
TensorBoard = Annotated[bool, typer.Option("--tensorboard/--no-tensorboard", help="Also write the log for TensorBoard.")]
TensorMemory = Annotated[str, typer.Option(help="Tensor Memory: none, default or paper.")]
