"""`tessera eval needle` and `tessera eval ruler`: retrieval from long texts through a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tessera.cli.errors import one_line_errors
from tessera.cli.many import ManyValues
from tessera.lab.cli.shared_options import Out

Model = Annotated[
    str | None, typer.Option(help="Folder, GGUF file or hub name of a causal language model.  [default: the demo model]")
]
Specs = Annotated[list[str] | None, typer.Option("--specs", "--spec", help="Cache specifications.  [default: nine of them]")]
Lengths = Annotated[
    list[int] | None,
    typer.Option("--lengths", "--length", help="Tokens of text, question and answer.  [default: 1024 2048 4096]", min=64),
]
Samples = Annotated[int, typer.Option(help="Number of texts of each kind, the same for every cache.", min=1)]
Seed = Annotated[int, typer.Option(help="Of the texts.")]
Chunk = Annotated[int, typer.Option(help="Tokens per call while the text is read.", min=1)]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.  [default: float32 on a CPU, else auto]")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...")]
Memory = Annotated[
    Path | None,
    typer.Option(help="File of a Tensor Cache for specs with tc.  [default: the demo model's, with the demo model]"),
]

OUT = Path("results/eval")


def needle(
    model: Model = None,
    specs: Specs = None,
    lengths: Lengths = None,
    depths: Annotated[
        list[int] | None,
        typer.Option("--depths", "--depth", help="Depths of the needle, in percent of the text.  [default: 0 25 50 75 100]"),
    ] = None,
    samples: Samples = 2,
    seed: Seed = 0,
    chunk: Chunk = 512,
    dtype: Dtype = None,
    device: Device = "cpu",
    memory: Memory = None,
    out: Out = OUT,
) -> None:
    """Hide a number in prose, by length and depth, and measure whether it is found through each cache.

    The text is generated, not downloaded. What is in the JSON already is not measured again.

    Example:

        tessera eval needle

        tessera eval needle --model ./my-model --lengths 1024 8192 --specs dense "sink:4 + hqmq:4 + recent:128"
    """
    from tessera.lab.evaluation import long_context
    from tessera.lab.evaluation.long_context_plot import plot_needle

    def plan(name: str, chosen: Sequence[str], sizes: Sequence[int]) -> list[Any]:
        return long_context.needle_plan(name, chosen, sizes, depths or long_context.DEPTHS, samples, seed, chunk)

    def tables(rows: Sequence[Any]) -> list[Any]:
        return [long_context.needle_table(rows)]

    _measure("needle.json", "length", plan, tables, plot_needle, (model, specs, lengths, dtype, device, memory, out))


def ruler(
    model: Model = None,
    specs: Specs = None,
    lengths: Lengths = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--tasks", "--task", help="single_1, multikey_2, vt, ...  [default: all eleven]")
    ] = None,
    samples: Samples = 2,
    seed: Seed = 0,
    chunk: Chunk = 512,
    dtype: Dtype = None,
    device: Device = "cpu",
    memory: Memory = None,
    out: Out = OUT,
) -> None:
    """RULER's synthetic tasks: needles of several kinds, a chain of variables, common and frequent words.

    Texts are generated, not downloaded; its question-answering tasks, which need a data set, are left out. What is in the
    JSON already is not measured again.

    Example:

        tessera eval ruler --tasks single_2 multikey_1 vt

        tessera eval ruler --model ./my-model --lengths 4096 8192 --samples 20
    """
    from tessera.lab.evaluation import long_context
    from tessera.lab.evaluation.long_context_plot import plot_ruler
    from tessera.lab.tasks.retrieval import RULER

    def plan(name: str, chosen: Sequence[str], sizes: Sequence[int]) -> list[Any]:
        return long_context.ruler_plan(name, chosen, sizes, tasks or list(RULER), samples, seed, chunk)

    given = (model, specs, lengths, dtype, device, memory, out)
    _measure("ruler.json", "task", plan, long_context.ruler_tables, plot_ruler, given)


def _measure(
    file: str,
    columns: str,
    plan: Callable[[str, Sequence[str], Sequence[int]], list[Any]],
    tables: Callable[[Sequence[Any]], list[Any]],
    draw: Callable[[Sequence[Any], Path], None],
    given: tuple[Any, ...],
) -> None:
    """Run a plan for both commands with a progress bar, print, draw, and name the files."""
    from rich.console import Console

    from tessera.cli.quiet import quiet
    from tessera.lab.cli import show

    quiet()
    from tessera import evaluation
    from tessera.lab.evaluation import long_context
    from tessera.models import demo_memory_path
    from tessera.tiers.per_layer import parse

    model, specs, lengths, dtype, device, memory, out = given
    with one_line_errors():
        path = show.folder(out) / file
        chosen = specs or list(long_context.SPECS)
        if any(parse(spec).tensor_cache for spec in chosen) and memory is None and model is None:
            memory = demo_memory_path()
        source = evaluation.load(model, dtype, device, memory)
        most = source.context or max(long_context.LENGTHS)
        jobs = plan(source.name, chosen, lengths or [n for n in long_context.LENGTHS if n <= most])
        found = show.run(jobs, long_context.measure(source, jobs, path), long_context.key, "reading")
    wanted = set(map(long_context.key, jobs))
    rows = [row for row in found if long_context.key(row) in wanted]
    *others, last = tables(rows)
    for table in others:
        show.print_table(table)
    show.table_and_picture(last, path, lambda to: draw(rows, to))
    for line in (
        "Share of right answers, then nats per token of the right answer: lower is better.",
        *long_context.remarks(rows, columns),
    ):
        Console().print(line, highlight=False)


def add_to(app: typer.Typer) -> None:
    """Add both commands to `tessera eval`."""
    for command in (needle, ruler):
        app.command(cls=ManyValues)(command)
