"""The root of the `tessera` command."""

from __future__ import annotations

import typer

from tessera import __version__
from tessera.cli import compare, generate, info, plan, prefill, stats, train, view
from tessera.cli import eval as evaluate
from tessera.cli.many import ManyValues

app = typer.Typer(
    help="Tessera: a bounded, compressed, persistent memory for Transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("compare", cls=ManyValues)(compare.compare)
app.command("generate")(generate.generate)
app.command("info")(info.info)
app.command("plan", cls=ManyValues)(plan.plan)
app.command("prefill")(prefill.prefill)
app.command("stats")(stats.stats)
app.command("view")(view.view)
app.add_typer(evaluate.app, name="eval")
app.add_typer(train.app, name="train")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tessera {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Tessera: a bounded, compressed, persistent memory for Transformers."""


def main() -> None:
    """Entry point of the `tessera` command."""
    app()
