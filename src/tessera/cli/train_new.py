"""`tessera train lm` and `tessera train recall`: small models from nothing, whose attention is a spec."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tessera.cli.errors import one_line_errors

Steps = Annotated[int | None, typer.Option(help="Train for this many steps.", min=1)]
MicroBatch = Annotated[int | None, typer.Option(help="Sequences of a forward pass.  [default: 4096 tokens of them]", min=1)]
Precision = Annotated[str, typer.Option(help="bf16 (autocast) or no.")]
Seed = Annotated[int, typer.Option(help="Of the weights and of the order of the data.")]
TensorBoard = Annotated[bool, typer.Option("--tensorboard/--no-tensorboard", help="Write the log for TensorBoard too.")]
Resume = Annotated[
    bool, typer.Option("--resume/--fresh", help="Go on from the newest checkpoint, or delete the run and start over.")
]
Rule = Annotated[str | None, typer.Option(help="Of a memory: outer, delta or wedge.  [default: delta]")]


def lm(
    spec: Annotated[
        str, typer.Option(help='Attention: "dense", "window:256", "sink:4 + window:256", "infini:64", "window:256 + tc".')
    ] = "dense",
    data: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text files to learn from.  [default: installed Python source]")
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory of the run: corpus, checkpoints, log, model.")] = Path("runs/lm"),
    hidden: Annotated[int, typer.Option(help="Width of the residual stream.")] = 256,
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 6,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 4,
    kv_heads: Annotated[int, typer.Option(help="Key heads.")] = 2,
    head_dim: Annotated[int, typer.Option(help="Width of a head.")] = 64,
    rule: Rule = None,
    vocabulary: Annotated[
        int | None,
        typer.Option(help="Entries of a tokenizer made for the data.  [default: 2048; without --data the demo model's own]"),
    ] = None,
    sequence: Annotated[int, typer.Option(help="Tokens of a training sequence.", min=2)] = 512,
    segments: Annotated[
        int, typer.Option(help="Sequences of a document in a step, the state carried from each to the next.", min=1)
    ] = 1,
    batch: Annotated[int, typer.Option(help="Sequences of a step, over all processes.", min=1)] = 16,
    micro_batch: MicroBatch = None,
    steps: Steps = None,
    minutes: Annotated[float | None, typer.Option(help="Train for this long instead (default: 20).", min=0.01)] = None,
    precision: Precision = "no",
    seed: Seed = 0,
    tensorboard: TensorBoard = True,
    resume: Resume = True,
) -> None:
    """Train a language model from nothing on text files; transformers' Auto classes load the result.

    Example:

        tessera train lm --spec "sink:4 + window:256 + tc" --data book.txt notes.txt --steps 2000

        tessera train lm --spec "window:256 + tc" --data book.txt --sequence 512 --segments 8

        torchrun --nproc-per-node 2 -m tessera train lm --spec dense --batch 32

        tensorboard --logdir runs/lm
    """
    from tessera.cli.quiet import quiet

    quiet()
    from tessera.training.lm import LmConfig, train_lm
    from tessera.training.schedule import LoopConfig, Phase

    if minutes is not None and steps is not None:
        raise typer.BadParameter("give --minutes or --steps, not both")
    with one_line_errors():
        loop = LoopConfig(
            phases=(Phase(1.0, sequence, batch, micro_batch, segments),),
            steps=steps,
            minutes=None if steps is not None else minutes or 20.0,
            mixed_precision=precision,
            seed=seed,
            warmup_steps=50 if steps is None else min(50, 1 + steps // 10),
            tensorboard=tensorboard,
        )
        memory = None if rule is None else {"rule": rule}
        config = LmConfig(spec, memory, hidden, layers, heads, kv_heads, head_dim, vocabulary, loop)
        state = train_lm(config, data or [], out, resume=resume)
    _say(f"{state.step:,} steps, {state.tokens:,} tokens, {state.seconds / 60:.1f} minutes; model in {out / 'model'}")


def recall(
    spec: Annotated[
        str, typer.Option(help='Attention: "dense", "window:16", "sink:4 + window:16", "infini:16", "window:16 + tc".')
    ] = "window:16 + tc",
    out: Annotated[Path, typer.Option(help="Directory of the run: log, model, recall.json.")] = Path("runs/recall"),
    pairs: Annotated[int, typer.Option(help="Keys of a sequence, each with a value.")] = 16,
    gap: Annotated[int, typer.Option(help="Tokens of filler between the last pair and the first question.")] = 64,
    rewrites: Annotated[int, typer.Option(help="Keys that are given another value.")] = 0,
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 2,
    heads: Annotated[int, typer.Option(help="Heads.")] = 2,
    head_dim: Annotated[int, typer.Option(help="Width of a head.")] = 64,
    hidden: Annotated[int, typer.Option(help="Width of the residual stream.")] = 128,
    rule: Rule = None,
    batch: Annotated[int, typer.Option(help="Sequences of a step, over all processes.", min=1)] = 32,
    micro_batch: MicroBatch = None,
    steps: Annotated[int, typer.Option(help="Steps of training.", min=1)] = 600,
    precision: Precision = "no",
    seed: Seed = 0,
    tensorboard: TensorBoard = True,
    resume: Resume = True,
) -> None:
    """Train a small model from nothing to recall pairs over a gap, and say how many it recalls.

    Example:

        tessera train recall --spec "window:16 + tc"

        tessera train recall --spec "sink:4 + window:16" --pairs 8 --steps 300 --out runs/window
    """
    from tessera.cli.quiet import quiet

    quiet()
    from tessera.tasks.recall import Recall
    from tessera.training.recall import RecallConfig, train_recall

    with one_line_errors():
        task = Recall(pairs=pairs, gap=gap, rewrites=rewrites, keys=max(64, pairs))
        memory = None if rule is None else {"rule": rule}
        config = RecallConfig(
            task, spec, memory, head_dim, layers, heads, hidden, batch, micro_batch, steps, seed, precision, tensorboard
        )
        found = train_recall(config, out, resume=resume)
    if "accuracy" not in found:
        return  # not the first process
    others = ", ".join(f"{value:.3f} at {name}" for name, value in found["by_gap"].items() if int(name) != gap)
    _say(
        f"accuracy {found['accuracy']:.3f} at the gap of {gap} that it was trained on (chance {found['chance']:.3f}); "
        f"at others: {others}\n{found['state_bytes'] / 1024:.0f} KiB kept for a sequence; model in {out / 'model'}"
    )


def _say(text: str) -> None:
    """Print in the first process alone."""
    from accelerate import PartialState

    if PartialState().is_main_process:
        typer.echo(text)
