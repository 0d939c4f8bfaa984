"""Output shared by the commands of `tessera eval`: progress bars, tables, and the list of files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import typer


def run(
    plan: Sequence[Any], parts: Iterable[list[dict[str, Any]]], key: Callable[[Any], object], word: str = "training"
) -> list[dict[str, Any]]:
    """Run a plan with a progress bar; returns all rows at the end."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn(word), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    rows: list[dict[str, Any]] = []
    with Progress(*columns, console=status(), transient=True) as bar:
        running = bar.add_task("", total=len(plan))
        for rows in parts:
            bar.update(running, completed=sum(key(job) in map(key, rows) for job in plan))
    return rows


def folder(out: Path) -> Path:
    """Check that a path is not a file, and return it."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, and {out} is a file")
    return out


def status() -> Any:
    """Return the console of progress bars."""
    from rich.console import Console

    return Console(stderr=True)


def cores() -> set[int] | range:
    """Return the number of cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def print_table(table: Any) -> Any:
    """Print a table, wide enough for a file."""
    from rich.console import Console

    console = Console()
    (console if console.width >= 110 or console.is_terminal else Console(width=120)).print(table)
    return console


def table_and_picture(table: Any, path: Path, draw: Callable[[Path], None] | None) -> None:
    """Print the table, draw the picture where matplotlib is installed, and name the files."""
    print_table(table)
    said = f"Saved {path}"
    if draw is not None:
        picture = path.with_suffix(".png")
        try:
            draw(picture)
            said += f" and {picture}"
        except ImportError:
            said += "; for a picture beside it: pip install 'tessera[lab]'"
    typer.echo(said)
