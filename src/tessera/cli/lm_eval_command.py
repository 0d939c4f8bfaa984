"""`tessera lm-eval`: the command of lm-evaluation-harness, which knows the model type `tessera` here."""

from __future__ import annotations

from importlib.util import find_spec

import typer


def lm_eval(ctx: typer.Context) -> None:
    """Run lm-evaluation-harness, with the additional model type tessera; all options are those of lm_eval.

    Example:

        tessera lm-eval --model tessera --model_args pretrained=MODEL,cache="sink:4 + hqmq:4 + recent:128" --tasks hellaswag
    """
    if {"--help", "-h"} & set(ctx.args):
        typer.echo(ctx.get_help())
        if find_spec("lm_eval") is None:
            raise typer.Exit
    if find_spec("lm_eval") is None:
        typer.echo("error: `tessera lm-eval` needs the package lm_eval: pip install 'tessera[lm_eval]'", err=True)
        raise typer.Exit(2)
    from tessera.integrations.lm_eval import main

    main(ctx.args)
