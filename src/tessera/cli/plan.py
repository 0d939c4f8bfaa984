"""`tessera plan`: which cache fits a context into a budget, from a model's config alone."""

from __future__ import annotations

from typing import Annotated

import typer

from tessera.cli.errors import one_line_errors


def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL_OR_CONFIG]",
            help="Folder with a config.json, config.json itself, GGUF file or hub name.  [default: the demo model]",
        ),
    ] = None,
    context: Annotated[str, typer.Option(help="Tokens of a sequence: 4096, 128k, 1M.")] = "128k",
    budget: Annotated[str, typer.Option(help="Bytes for the cache: 8GiB, 512MB.")] = "8GiB",
    batch: Annotated[int, typer.Option(help="Sequences in a batch.", min=1)] = 1,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16, of keys and values.  [default: the config's, else bfloat16]"),
    ] = None,
    bandwidth: Annotated[str | None, typer.Option(help="Memory bandwidth, to estimate the time of a read: 50GB/s.")] = None,
    specs: Annotated[
        list[str] | None,
        typer.Option("--specs", "--spec", help="Candidates.  [default: exact, the best codecs and known ones, windows]"),
    ] = None,
) -> None:
    """Count the bytes of caches for a context, and name the one that loses least within a budget.

    No weights are read. The bytes are those that Cache.report() counts when the tokens have been read, exactly. Candidates
    rank by the tokens that they keep, then by an error that was measured on a pretrained model. Exit code 1: none fits.

    Example:

        tessera plan Qwen/Qwen3-8B --context 128k --budget 8GiB

        tessera plan ./config.json --context 32k --budget 2GiB --batch 4 --bandwidth 50GB/s

        tessera plan ./model.gguf --context 1M --budget 16GiB --specs "sink:4 + hqmq:3 + recent:128" "sink:4 + window:8192"
    """
    from rich.console import Console

    from tessera.cli.quiet import quiet

    quiet()
    from tessera.evaluation.loading import load_config
    from tessera.planning import plan as find
    from tessera.planning.plan_table import advice, caption, table

    console = Console()
    with one_line_errors():
        config = load_config(model)
        found = find(config, context=context, budget=budget, batch=batch, dtype=dtype, bandwidth=bandwidth, specs=specs or None)
    wide = console if console.width >= 160 or console.is_terminal else Console(width=160)
    wide.print(table(found))
    console.print(caption(found, model or "the demo model"), highlight=False, markup=False, soft_wrap=True)
    console.print(advice(found), highlight=False, markup=False, soft_wrap=True)
    if found.spec is None:
        raise typer.Exit(1)
