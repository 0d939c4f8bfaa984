"""`tessera train lm` and `tessera train recall`: small models from scratch, whose attention is a spec."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tessera.cli.errors import one_line_errors
from tessera.lab.cli.say import say
from tessera.lab.cli.shared_options import (
    Batch,
    Gap,
    HeadDim,
    Heads,
    Hidden,
    Layers,
    MicroBatch,
    Minutes,
    Pairs,
    Precision,
    Resume,
    Rewrites,
    Rule,
    Seed,
    Steps,
    StepsOrMinutes,
    TensorBoard,
)


def lm(
    spec: Annotated[
        str, typer.Option(help='Attention: "dense", "window:256", "sink:4 + window:256", "infini:64", "window:256 + tc".')
    ] = "dense",
    data: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text files to learn from.  [default: installed Python source]")
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory of the run: corpus, checkpoints, log, model.")] = Path("runs/lm"),
    hidden: Hidden = 256,
    layers: Layers = 6,
    heads: Heads = 4,
    kv_heads: Annotated[int, typer.Option(help="Key heads.")] = 2,
    head_dim: HeadDim = 64,
    rule: Rule = None,
    vocabulary: Annotated[
        int | None,
        typer.Option(
            help="Vocabulary size of a tokenizer trained on the data.  [default: 2048; without --data the demo model's own]"
        ),
    ] = None,
    sequence: Annotated[int, typer.Option(help="Tokens of a training sequence.", min=2)] = 512,
    segments: Annotated[
        int, typer.Option(help="Sequences of a document per step, with the state kept from each to the next.", min=1)
    ] = 1,
    batch: Batch = 16,
    micro_batch: MicroBatch = None,
    steps: StepsOrMinutes = None,
    minutes: Minutes = None,
    precision: Precision = "no",
    seed: Seed = 0,
    tensorboard: TensorBoard = True,
    resume: Resume = True,
) -> None:
    """Train a language model from scratch on text files; transformers' Auto classes load the result.

    Example:

        tessera train lm --spec "sink:4 + window:256 + tc" --data book.txt notes.txt --steps 2000

        tessera train lm --spec "window:256 + tc" --data book.txt --sequence 512 --segments 8

        torchrun --nproc-per-node 2 -m tessera train lm --spec dense --batch 32

        tensorboard --logdir runs/lm
    """
    from tessera.cli.quiet import quiet

    quiet()
    from tessera.lab.training.lm import LmConfig, train_lm
    from tessera.lab.training.schedule import LoopConfig, Phase

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
    say(f"{state.step:,} steps, {state.tokens:,} tokens, {state.seconds / 60:.1f} minutes; model in {out / 'model'}")


def recall(
    spec: Annotated[
        str, typer.Option(help='Attention: "dense", "window:16", "sink:4 + window:16", "infini:16", "window:16 + tc".')
    ] = "window:16 + tc",
    out: Annotated[Path, typer.Option(help="Directory of the run: log, model, recall.json.")] = Path("runs/recall"),
    pairs: Pairs = 16,
    gap: Gap = 64,
    rewrites: Rewrites = 0,
    layers: Layers = 2,
    heads: Heads = 2,
    head_dim: HeadDim = 64,
    hidden: Hidden = 128,
    rule: Rule = None,
    batch: Batch = 32,
    micro_batch: MicroBatch = None,
    steps: Steps = 600,
    near: Annotated[float, typer.Option(help="Share of the steps, at the beginning, that are without a gap.")] = 0.4,
    precision: Precision = "no",
    seed: Seed = 0,
    tensorboard: TensorBoard = True,
    resume: Resume = True,
) -> None:
    """Train a small model from scratch to recall pairs over a gap, and measure how many it recalls.

    Example:

        tessera train recall --spec "window:16 + tc"

        tessera train recall --spec "sink:4 + window:16" --pairs 8 --steps 300 --out runs/window
    """
    from tessera.cli.quiet import quiet

    quiet()
    from tessera.lab.tasks.associative_recall import Recall
    from tessera.lab.training.recall_training import RecallConfig, train_recall

    with one_line_errors():
        task = Recall(pairs=pairs, gap=gap, rewrites=rewrites, keys=max(64, pairs))
        memory = None if rule is None else {"rule": rule}
        config = RecallConfig(
            task=task,
            attention=spec,
            memory=memory,
            dim=head_dim,
            layers=layers,
            heads=heads,
            hidden=hidden,
            batch=batch,
            micro_batch=micro_batch,
            steps=steps,
            near=near,
            seed=seed,
            precision=precision,
            tensorboard=tensorboard,
        )
        found = train_recall(config, out, resume=resume)
    if "accuracy" not in found:
        return  # in other processes than the first
    others = ", ".join(f"{value:.3f} at {name}" for name, value in found["by_gap"].items() if int(name) != gap)
    say(
        f"accuracy {found['accuracy']:.3f} at the gap of {gap} that it was trained on (chance {found['chance']:.3f}); "
        f"at others: {others}\n{found['state_bytes'] / 1024:.0f} KiB kept for a sequence; model in {out / 'model'}"
    )
