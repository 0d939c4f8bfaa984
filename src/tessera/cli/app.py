"""The root of the `tessera` command."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from typer.core import TyperGroup

from tessera import __version__
from tessera.cli import compare, generate, info, lm_eval_command, plan, prefill, stats
from tessera.cli.many import ManyValues

#: Entry points of this group are Typer applications that become commands, such as those of `tessera.lab`.
GROUP = "tessera.commands"


class Commands(TyperGroup):
    """The core's commands, followed by those of entry points, which are imported when one of them is used or listed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._broken: set[str] = set()  # names of entry points that could not be imported

    def list_commands(self, ctx: Any) -> list[str]:
        """List the names of all commands, for the help."""
        self._add_others()
        return super().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command of this name, or None."""
        if cmd_name not in self.commands:
            self._add_others(cmd_name)
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: Any) -> Any:
        """Run a command; if a package is missing for one of an entry point, say which extra installs it."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if ctx.invoked_subcommand not in {each.name for each in _others()} or package == "tessera":
                raise
            said = f"`tessera {ctx.invoked_subcommand}` needs the package {package}: pip install 'tessera[lab]'"
            typer.echo(f"error: {said if package else error}", err=True)
            raise typer.Exit(2) from error

    def _add_others(self, only: str | None = None) -> None:
        for each in _others():
            if each.name in self.commands or each.name in self._broken or only not in (None, each.name):
                continue
            try:
                self.add_command(typer.main.get_command(each.load()), each.name)
            except (Exception, SystemExit) as error:  # another package's mistake, which must not take the other commands away
                self._broken.add(each.name)
                said = next(iter(str(error).splitlines()), "")
                owner = each.dist.name if each.dist is not None else each.value
                typer.echo(f"warning: `tessera {each.name}` of {owner} is left out: {type(error).__name__}: {said}", err=True)


def _others() -> list[EntryPoint]:
    return list(entry_points(group=GROUP))


app = typer.Typer(
    cls=Commands,
    help="Tessera: a bounded, compressed, persistent memory for Transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("compare", cls=ManyValues)(compare.compare)
app.command("generate")(generate.generate)
app.command("info")(info.info)
# Its options, including --help, are the harness's.
app.command("lm-eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})(
    lm_eval_command.lm_eval
)
app.command("plan", cls=ManyValues)(plan.plan)
app.command("prefill")(prefill.prefill)
app.command("stats")(stats.stats)


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
