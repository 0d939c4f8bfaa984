"""`tessera compare`: cache specifications side by side on one model and one text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tessera.cli.errors import one_line_errors


def compare(
    model: Annotated[
        list[str] | None,
        typer.Option(help="Folders, GGUF files or hub names of causal language models.  [default: the demo model]"),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="UTF-8 text files.  [default: held-out standard-library modules]"),
    ] = None,
    specs: Annotated[
        list[str] | None,
        typer.Option("--specs", "--spec", help="Cache specifications.  [default: sixteen of them]"),
    ] = None,
    protocol: Annotated[list[str] | None, typer.Option(help="streaming or paper.  [default: both]")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a window.  [default: 2048, or the model's if shorter]")] = None,
    windows: Annotated[int, typer.Option(help="Windows to read.")] = 4,
    batch: Annotated[int, typer.Option(help="Windows read at once.")] = 4,
    skip: Annotated[int, typer.Option(help="Tokens of the text to leave out before the first window.")] = 0,
    chunk: Annotated[int, typer.Option(help="Tokens per call in the streaming protocol.")] = 64,
    layers: Annotated[
        bool, typer.Option("--layers/--no-layers", help="Also measure every layer's attention alone, on the first window.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or float16.  [default: float32 on a CPU, else auto]")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    memory: Annotated[
        Path | None,
        typer.Option(help="File of a Tensor Cache for specs with tc.  [default: the demo model's, with the demo model]"),
    ] = None,
    stats: Annotated[
        Path | None, typer.Option(help="File of key statistics, see tessera stats.  [default: each window's own]")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for compare.json, compare.png and layers.png.")] = Path("results/compare"),
) -> None:
    """Compare caches: perplexity, divergence, true bits, bytes and speed.

    Two protocols: "streaming", as in generation (older tokens are read from the cache), and "paper" (every key and value except
    those of "sink" is quantised before attention reads it; "recent" is left out). A table is printed and saved
    as JSON and as a picture. On a model whose first token is an attention sink, a cache without "sink" is also measured
    with "sink:4", and a line says what the missing sinks cost. --layers shows the error of each layer on the exact model's
    queries, keys and values.

    Example:

        tessera compare

        tessera compare --specs window:256 "sink:4 + window:256" "sink:4 + window:256 + tc"

        tessera compare --model ./my-model --text book.txt --specs "sink:4 + hqmq:4 + recent:128" q4_0

        tessera compare --model ./model.gguf --text book.txt

        tessera compare --model ./small --model ./large --text book.txt --skip 10000
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from tessera.cli.quiet import quiet

    quiet()
    from tessera import evaluation
    from tessera.codecs.channel_stats import load_stats
    from tessera.evaluation.layers_plot import plot_layers
    from tessera.evaluation.layers_table import layer_tables
    from tessera.evaluation.plot import pareto
    from tessera.evaluation.protocols import PROTOCOLS
    from tessera.evaluation.table import advice, caption, differences, tables, without_sinks
    from tessera.models import demo_memory_path
    from tessera.tiers.per_layer import parse

    console, status = Console(), Console(stderr=True)
    names: list[str | None] = list(dict.fromkeys(model or ())) or [None]
    results = []
    with one_line_errors():
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out must be a folder, and {out} is a file")
        if memory is not None and len(names) > 1:
            raise ValueError(f"--memory was made for one model, and {len(names)} are given")
        if stats is not None and len(names) > 1:
            raise ValueError(f"--stats are of one model, and {len(names)} are given")
        if any(parse(spec).tensor_cache for spec in specs or ()) and memory is None and names == [None]:
            memory = demo_memory_path()
        content, name = evaluation.read_text(text or ())
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        for which in names:
            source = evaluation.load(which, dtype, device, memory)
            bar = Progress(*columns, console=status, transient=True)
            task = bar.add_task("measuring", total=None)

            def progress(what: str, done: int, steps: int, bar: Any = bar, task: Any = task, of: str = source.name) -> None:
                bar.start()  # not before the first step: errors in the input are known by then
                bar.update(task, description=f"{of}, protocol {what}", completed=done, total=steps)

            try:
                result = evaluation.compare(
                    source,
                    content,
                    specs,
                    protocols=protocol or PROTOCOLS,
                    context=context,
                    chunk=chunk,
                    count=windows,
                    batch=batch,
                    skip=skip,
                    layers=layers,
                    stats=None if stats is None else load_stats(stats),
                    text_name=name,
                    progress=progress,
                )
            finally:
                if bar.live.is_started:
                    bar.stop()
            results.append(result)
            del source  # freed before the next model is loaded
            evaluation.save_all(results, out / "compare.json")  # so that finished results are kept if a later model fails
    wide = console if console.width >= 130 or console.is_terminal else Console(width=150)
    for result in results:
        for table in tables(result, named=len(results) > 1, width=wide.width):
            wide.print(table)
        for table in layer_tables(result):
            wide.print(table)
        console.print(caption(result), highlight=False)
        for line in (*without_sinks(result), *differences(result)):
            console.print(line, highlight=False)
    try:
        pareto(results, out / "compare.png")
        pictures = [out / "compare.png"]
        if any(result.layers for result in results):
            plot_layers(results, out / "layers.png")
            pictures.append(out / "layers.png")
        console.print("Saved " + " and ".join(map(str, [out / "compare.json", *pictures])), highlight=False)
    except ImportError:
        console.print(
            f"Saved {out / 'compare.json'}; for a picture beside it: pip install 'tessera[eval]'",
            highlight=False,
            markup=False,
        )
    console.print()
    for result in results:
        console.print((f"{result.model}: " if len(results) > 1 else "") + advice(result), highlight=False, markup=False)
