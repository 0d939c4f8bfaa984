"""What a command that may run in several processes says, once."""

from __future__ import annotations

import typer


def say(text: str) -> None:
    """Print in the first process alone."""
    from accelerate import PartialState

    if PartialState().is_main_process:
        typer.echo(text)
