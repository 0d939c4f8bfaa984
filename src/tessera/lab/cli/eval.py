"""`tessera eval`: measurements of memories and caches, as tables, JSON and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tessera.cli.errors import one_line_errors
from tessera.cli.many import ManyValues
from tessera.lab.cli import eval_long, show
from tessera.lab.cli.shared_options import Gap, HeadDim, Jobs, Out, Pairs, Rewrites, Steps

app = typer.Typer(
    help="Measure memories and caches: recall, diagnostics, capacity, language, streams, needle, ruler.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

OUT = Path("results/eval")


@app.callback()
def _group() -> None:
    """Measure memories and caches: recall, diagnostics, capacity, language, streams, needle, ruler."""


@app.command(cls=ManyValues)
def recall(
    methods: Annotated[
        list[str] | None,
        typer.Option("--methods", "--method", help="Methods to train.  [default: four of them]"),
    ] = None,
    pairs: Pairs = 4,
    gap: Gap = 40,
    dim: HeadDim = 64,
    rewrites: Rewrites = 0,
    seeds: Annotated[int, typer.Option(help="Number of models of each method.", min=1)] = 1,
    steps: Steps = 300,
    full: Annotated[
        bool, typer.Option("--full", help="Run the plan of docs/results/recall.json instead, which takes hours.")
    ] = False,
    jobs: Jobs = None,
    out: Out = OUT,
) -> None:
    """Train small models from scratch to recall pairs that have left their window, and measure their accuracy.

    Models that are in the JSON already are not trained again.

    Example:

        tessera eval recall

        tessera eval recall --methods dense "Tensor Cache, outer" --pairs 8 --steps 400

        tessera eval recall --full --out results/recall
    """
    from tessera.cli.quiet import quiet

    quiet()
    from tessera.lab.evaluation import recall as task
    from tessera.lab.evaluation.recall_plot import plot_recall

    with one_line_errors():
        path = show.folder(out) / "recall.json"
        chosen = methods or list(task.METHODS if full else task.QUICK_METHODS)
        if full:
            plan = [job for job in task.full_plan() if job["method"] in chosen]
        else:
            plan = task.quick_plan(chosen, seeds, pairs=pairs, gap=gap, dim=dim, rewrites=rewrites, steps=steps)
        parts = task.recall(plan, path, jobs or len(show.cores()))
        rows = show.run(plan, parts, task.key)
    show.table_and_picture(task.recall_table(rows), path, lambda to: plot_recall(rows, to))


@app.command(cls=ManyValues)
def diagnostics(
    tasks: Annotated[
        list[str] | None, typer.Option("--tasks", "--task", help="occlusion, map, binding, no harm.  [default: all]")
    ] = None,
    kinds: Annotated[
        list[str] | None, typer.Option("--kinds", "--kind", help="plain, wide, slots, memory.  [default: all]")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of models of each kind.  [default: 1; --full 3]", min=1)] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of training.  [default: 300; --quick 80, --full 1000]", min=1)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only two tasks, small enough to take seconds.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Also the original tasks, delays and settings, which takes hours on a CPU.")
    ] = False,
    jobs: Jobs = None,
    out: Out = OUT,
) -> None:
    """Train small models with and without a Tensor Memory on tasks that require a memory.

    Models that are in the JSON already are not trained again.

    Example:

        tessera eval diagnostics --quick

        tessera eval diagnostics --tasks binding map --kinds plain memory --seeds 3
    """
    from tessera.cli.quiet import quiet as silent

    silent()
    from tessera.lab.evaluation import diagnostics as plans
    from tessera.lab.evaluation.diagnostics_plot import plot_diagnostics

    with one_line_errors():
        if quick and full:
            raise ValueError("give --quick or --full, not both")
        path = show.folder(out) / "diagnostics.json"
        wanted, models = tasks or list(plans.TASKS), kinds or list(plans.KINDS)
        for name, chosen, known in (("task", wanted, plans.TASKS), ("kind", models, plans.KINDS)):
            for word in chosen:
                if word not in known:
                    raise ValueError(f"no {name} {word!r}; there are {', '.join(known)}")
        if full:
            plan = plans.full_plan(seeds or 3, steps or 1000)
        elif quick:
            plan = plans.quick_plan(kinds or ("plain", "memory"), seeds or 1, steps or 80)
        else:
            plan = plans.default_plan(wanted, models, seeds or 1, steps or 300)
        plan = [job for job in plan if job["task"] in wanted and job["kind"] in models]
        parts = plans.diagnostics(plan, path, jobs or len(show.cores()))
        rows = show.run(plan, parts, plans.key)
        if not rows:
            raise ValueError("there is nothing to measure: --quick has binding and no harm only")
    *tables, last = plans.diagnostics_tables(rows)
    for table in tables:
        show.print_table(table)
    show.table_and_picture(last, path, lambda to: plot_diagnostics(rows, to))


@app.command(cls=ManyValues)
def capacity(
    widths: Annotated[list[int] | None, typer.Option(help="Widths of the matrix.  [default: 16 32 64]")] = None,
    trials: Annotated[int, typer.Option(help="Number of memories to average over.")] = 4,
    full: Annotated[bool, typer.Option("--full", help="Use the widths and trials of docs/results/capacity.json.")] = False,
    out: Out = OUT,
) -> None:
    """Store random pairs in one matrix, read every key, and count the recalled values, by rule and width.

    Example:

        tessera eval capacity

        tessera eval capacity --widths 64 256 --trials 8
    """
    from rich.progress import track

    from tessera.cli.quiet import quiet

    quiet()
    from tessera.evaluation.records import environment
    from tessera.files import write_json
    from tessera.lab.evaluation.capacity import WIDTHS, capacity_table, plot_capacity
    from tessera.lab.evaluation.capacity import capacity as measure

    with one_line_errors():
        path = show.folder(out) / "capacity.json"
        wanted, times = (WIDTHS, 16) if full else (widths or (16, 32, 64), trials)
        parts = measure(wanted, times)
        rows = [row for part in track(parts, "storing", len(wanted), console=show.status(), transient=True) for row in part]
        write_json(path, {"environment": environment(), "trials": times, "rows": rows})
    show.table_and_picture(capacity_table(rows), path, lambda to: plot_capacity(rows, to))


@app.command(cls=ManyValues)
def language(
    model: Annotated[
        str | None, typer.Option(help="Folder or hub name of a causal language model.  [default: the demo model]")
    ] = None,
    memory: Annotated[
        Path | None, typer.Option(help="File of its Tensor Cache.  [default: the demo model's, with the demo model]")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text files.  [default: held-out standard-library modules]")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of a sequence.", min=2)] = 2048,
    windows: Annotated[int, typer.Option(help="Sequences to read.", min=1)] = 2,
    full: Annotated[
        bool, typer.Option("--full", help="Read the whole text, as for docs/results/language_memory.json.")
    ] = False,
    out: Out = OUT,
) -> None:
    """Measure the loss by position with a Tensor Cache behind the window, without one, and with its reads off.

    Example:

        tessera eval language

        tessera eval language --model runs/lm/model --text book.txt --tokens 4096
    """
    from rich.progress import Progress

    from tessera.cli.quiet import quiet

    quiet()
    from tessera import evaluation
    from tessera.files import write_json
    from tessera.lab.evaluation.language import language as measure
    from tessera.lab.evaluation.language import language_table
    from tessera.lab.evaluation.language_plot import plot_language
    from tessera.models import demo_memory_path

    with one_line_errors():
        path = show.folder(out) / "language_memory.json"
        if model is None and memory is None:
            memory = demo_memory_path()
        content, _ = evaluation.read_text(text or ())
        source = evaluation.load(model, memory=memory)
        with Progress(console=show.status(), transient=True) as bar:
            running = bar.add_task("reading", total=None)
            record = measure(
                source,
                content,
                tokens=tokens,
                count=None if full else windows,
                progress=lambda done, steps: bar.update(running, completed=done, total=steps),
            )
        write_json(path, record)
    show.table_and_picture(language_table(record), path, lambda to: plot_language(record["rows"], record["edges"], to))


@app.command(cls=ManyValues)
def streams(
    specs: Annotated[
        list[str] | None,
        typer.Option("--specs", "--spec", help="Caches.  [default: dense, a window, a window with a Tensor Cache]"),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of a stream.", min=1024)] = 16_384,
    dense: Annotated[int, typer.Option(help="Tokens of a stream with a growing cache.", min=1024)] = 8_192,
    out: Out = OUT,
) -> None:
    """Read a long stream through a small model: bytes of state and tokens per second against the tokens read.

    Example:

        tessera eval streams

        tessera eval streams --specs "window:256 + tc" "sink:4 + hqmq:4 + recent:128" --tokens 65536
    """
    from rich.progress import Progress

    from tessera.cli.quiet import quiet

    quiet()
    from tessera.evaluation.records import environment
    from tessera.files import write_json
    from tessera.lab.evaluation import long_streams as measure
    from tessera.tiers.spec import parse

    with one_line_errors():
        path = show.folder(out) / "streams.json"
        wanted = specs or list(measure.SPECS)
        for spec in wanted:
            parse(spec)  # errors are raised before anything is measured
        with Progress(console=show.status(), transient=True) as bar:
            running = bar.add_task("streaming", total=len(wanted))
            rows = measure.streams(wanted, tokens, dense, lambda: bar.advance(running))
        write_json(path, {"environment": environment(), "stream": rows})
    show.table_and_picture(measure.streams_table(rows), path, None)


eval_long.add_to(app)
