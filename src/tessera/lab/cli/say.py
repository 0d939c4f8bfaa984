"""Output of a command that may run in several processes."""

from __future__ import annotations

import typer


def say(text: str) -> None:
    """Print in the first process only."""
    from accelerate import PartialState

    if PartialState().is_main_process:
        typer.echo(text)
