"""`tessera train`: train the models that Tessera ships."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tessera.cli.errors import one_line_errors

app = typer.Typer(help="Train the models that Tessera ships.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Train the models that Tessera ships."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory of the run: corpus, checkpoints, log, exported model.")] = Path(
        "runs/demo"
    ),
    minutes: Annotated[float | None, typer.Option(help="Train for this long (default: 40).", min=0.01)] = None,
    steps: Annotated[int | None, typer.Option(help="Train for this many steps instead.", min=1)] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume/--fresh", help="Go on from the newest checkpoint, or delete the run and start over."),
    ] = True,
    tiny: Annotated[bool, typer.Option("--tiny", help="A model that learns nothing, to check the machinery.")] = False,
    install: Annotated[bool, typer.Option("--install", help="Also export into the installed package.")] = False,
) -> None:
    """Train the demo language model on Python source code, from nothing, on a CPU or a GPU.

    The standard library and the permissively licensed packages installed here are the data; one module in twenty of the
    standard library is held out. A run that was interrupted goes on where it stopped.

    Example:

        tessera train demo --out runs/demo --minutes 40

        tessera train demo --out runs/demo --minutes 80   # the same run, for another 40 minutes
    """
    from dataclasses import replace

    import tessera.models
    from tessera.training.demo import TINY, DemoConfig, train_demo

    if minutes is not None and steps is not None:
        raise typer.BadParameter("give --minutes or --steps, not both")
    config = TINY if tiny else DemoConfig()
    if minutes is not None or steps is not None:
        config = replace(config, loop=replace(config.loop, minutes=minutes, steps=steps))
    target = Path(tessera.models.__file__).parent / "demo" if install else None
    with one_line_errors():
        state = train_demo(config, out, resume=resume, target=target, evaluate_bytes=4_000 if tiny else 300_000)
    typer.echo(f"{state.step:,} steps, {state.tokens:,} tokens, {state.seconds / 60:.1f} minutes; model in {out / 'model'}")
