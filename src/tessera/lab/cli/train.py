"""`tessera train`: small models from scratch, the demo model, and memories."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import typer

from tessera.cli.errors import one_line_errors
from tessera.cli.many import ManyValues
from tessera.lab.cli import train_new, train_vision
from tessera.lab.cli.shared_options import Minutes, Precision, Resume, Rule, Seed, StepsOrMinutes

app = typer.Typer(help="Train models and memories.", no_args_is_help=True, add_completion=False, rich_markup_mode=None)
app.command("lm", cls=ManyValues)(train_new.lm)
app.command("recall")(train_new.recall)
app.command("image")(train_vision.image)
app.command("video")(train_vision.video)


@app.callback()
def _group() -> None:
    """Train models and memories."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory of the run: corpus, checkpoints, log, exported model.")] = Path(
        "runs/demo"
    ),
    minutes: Annotated[float | None, typer.Option(help="Train for this many minutes instead (default: 40).", min=0.01)] = None,
    steps: StepsOrMinutes = None,
    resume: Resume = True,
    tiny: Annotated[bool, typer.Option("--tiny", help="Train a tiny model for a few seconds, to check the machinery.")] = False,
    install: Annotated[bool, typer.Option("--install", help="Also export to the installed package.")] = False,
) -> None:
    """Train the demo language model on Python source code, from scratch, on a CPU or a GPU.

    The standard library and the permissively licensed packages installed here are the data; one module in twenty of the
    standard library is held out. An interrupted run continues where it stopped.

    Example:

        tessera train demo --out runs/demo --minutes 40

        tessera train demo --out runs/demo --minutes 80   # the same run, for another 40 minutes
    """
    from dataclasses import replace

    import tessera.models
    from tessera.lab.training.demo import TINY, DemoConfig, train_demo

    if minutes is not None and steps is not None:
        raise typer.BadParameter("give --minutes or --steps, not both")
    config = TINY if tiny else DemoConfig()
    if minutes is not None or steps is not None:
        config = replace(config, loop=replace(config.loop, minutes=minutes, steps=steps))
    target = Path(tessera.models.__file__).parent / "demo" if install else None
    with one_line_errors():
        state = train_demo(config, out, resume=resume, target=target, evaluate_bytes=4_000 if tiny else 300_000)
    typer.echo(f"{state.step:,} steps, {state.tokens:,} tokens, {state.seconds / 60:.1f} minutes; model in {out / 'model'}")


@app.command(cls=ManyValues)
def memory(
    model: Annotated[str | None, typer.Option(help="Folder of a causal language model (default: the demo model).")] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text files to learn from.  [default: installed Python source]")
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory of the run: checkpoints, log, memory.safetensors.")] = Path(
        "runs/memory"
    ),
    window: Annotated[int, typer.Option(help="Number of newest tokens that attention sees.", min=1)] = 256,
    windows: Annotated[
        list[int] | None,
        typer.Option(help="Draw the window of each step from these sizes."),
    ] = None,
    sink: Annotated[int, typer.Option(help="Number of first tokens that attention always sees.", min=0)] = 4,
    rule: Rule = None,
    rates: Annotated[
        str | None, typer.Option(help="Whether decay and write rate are per head or per token.  [default: head]")
    ] = None,
    gate: Annotated[
        str | None, typer.Option(help="Whether the gate of reads is per layer or per token.  [default: layer]")
    ] = None,
    slots: Annotated[int | None, typer.Option(help="Number of matrices per head.  [default: 1]", min=1)] = None,
    rotary: Annotated[
        bool | None, typer.Option("--rotary/--no-rotary", help="Write and read with the rotary phase.  [default: without]")
    ] = None,
    normalise_queries: Annotated[
        bool | None,
        typer.Option("--normalise-queries/--raw-queries", help="Whether queries are normalised to length 1.  [default: yes]"),
    ] = None,
    objective: Annotated[str, typer.Option(help="Objective: kl, the dense model's predictions, or ce, the text.")] = "kl",
    sequence: Annotated[
        int | None,
        typer.Option(help="Tokens of a training sequence.  [default: eight windows, or the model's context]", min=2),
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences per step.", min=1)] = 4,
    minutes: Minutes = None,
    steps: StepsOrMinutes = None,
    precision: Precision = "no",
    seed: Seed = 0,
    resume: Resume = True,
) -> None:
    """Attach a Tensor Cache to a model and train it; the model itself is frozen.

    Afterwards: tessera.load_memory(model, "runs/memory/memory.safetensors"), and a cache "sink:4 + window:256 + tc".

    Example:

        tessera train memory --minutes 20

        tessera train memory --model path/to/model --data book.txt --window 512 --rates token
    """
    import torch

    import tessera
    from tessera.evaluation import load
    from tessera.lab.training.memory import MemoryTraining, train_memory
    from tessera.lab.training.schedule import LoopConfig, Phase
    from tessera.tensor_cache import TensorCacheConfig

    if minutes is not None and steps is not None:
        raise typer.BadParameter("give --minutes or --steps, not both")
    options = {
        "rule": rule,
        "rates": rates,
        "gate": gate,
        "slots": slots,
        "rotary": rotary,
        "normalise_queries": normalise_queries,
    }
    with one_line_errors():
        training = MemoryTraining(objective, tuple(windows or ()))  # type: ignore[arg-type]
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        config = TensorCacheConfig(window=window, sink=sink, **given)
        source = load(model)
        longest = 8 * max(window, *training.windows, 1)
        loop = LoopConfig(
            phases=(Phase(1.0, sequence or min(longest, source.context or longest), batch),),
            minutes=None if steps is not None else minutes or 20.0,
            steps=steps,
            mixed_precision=precision,
            muon_lr=2e-3,
            adamw_lr=2e-3,
            warmup_steps=20,
            seed=seed,
            tensorboard=True,
        )
        torch.manual_seed(seed)
        tessera.attach(source.model, config)
        state = train_memory(source.model, _text_sampler(source, data or [], out), loop, out, training, resume=resume)
    typer.echo(f"{state.step:,} steps, {state.tokens:,} tokens, {state.seconds / 60:.1f} minutes; {out / 'memory.safetensors'}")


def _text_sampler(source: Any, files: list[Path], out: Path) -> Any:
    """Return a sampler of windows of text files, or of the demo model's training data."""
    import numpy as np
    import torch

    from tessera.evaluation import read_text
    from tessera.lab.training.corpus import Corpus, training_files

    tokenizer = source.tokenizer
    if not files:
        from tessera.lab.training.checkpoints import claim

        folder = out / "corpus"
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if bos is None or eos is None or len(tokenizer) > 1 << 16:
            raise ValueError("this model's tokenizer cannot be used on the default data; give text files with --data")
        claim(folder, {"tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()})
        if (folder / "corpus.json").is_file():
            return Corpus(folder).sample
        return Corpus.build(folder, training_files(), tokenizer.backend_tokenizer, bos, eos).sample
    text, _ = read_text(files)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])

    def sample(seed: tuple[int, ...], batch: int, length: int) -> torch.Tensor:
        if len(ids) <= length:
            raise ValueError(f"the text has {len(ids)} tokens, which is less than a sequence of {length}; use --sequence")
        starts = np.random.default_rng(seed).integers(0, len(ids) - length, batch)
        rows = torch.stack([ids[start : start + length] for start in starts])
        if tokenizer.bos_token_id is not None:
            rows[:, 0] = tokenizer.bos_token_id
        return rows

    return sample
