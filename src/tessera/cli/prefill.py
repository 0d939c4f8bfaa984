"""`tessera prefill`: let a model read a text once, and save the cache to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tessera.cli.errors import one_line_errors


def prefill(
    prompt_file: Annotated[Path, typer.Option(help="UTF-8 file with the text to read.")],
    out: Annotated[Path, typer.Option(help="File for the cache.")],
    model: Annotated[
        str | None, typer.Option(help="Folder, GGUF file or hub name of a causal language model.  [default: the demo model]")
    ] = None,
    cache: Annotated[str, typer.Option(help="Cache specification.")] = "sink:4 + hqmq:4 + recent:128",
    memory: Annotated[
        Path | None,
        typer.Option(help="File of a Tensor Cache for a cache with tc.  [default: the demo model's, with the demo model]"),
    ] = None,
    stats: Annotated[
        Path | None, typer.Option(help="File of key statistics, see tessera stats.  [default: the text's own]")
    ] = None,
    chunk: Annotated[int, typer.Option(help="Tokens per call.", min=1)] = 2048,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or float16.  [default: float32 on a CPU, else auto]")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Read a text into a cache and save it to a file, from which tessera generate continues without reading the text again.

    The file also says which model read the text, how many tokens there were, and a hash of them, and is sealed: a file that was
    cut short or altered is refused, and so is another model, or another revision of it.

    Example:

        tessera prefill --model ./my-model --prompt-file book.txt --out book.cache

        tessera generate --model ./my-model --from book.cache --prompt "In short:"
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from tessera.cli.memories import memory_for
    from tessera.cli.quiet import quiet

    quiet()
    from tessera import evaluation
    from tessera.evaluation import prefill_file as files

    console = Console()
    with one_line_errors():
        if out.is_dir():
            raise ValueError(f"--out must be a file, and {out} is a folder")
        memory = memory_for(cache, memory, model)
        text = evaluation.read_text([prompt_file])[0]
        source = evaluation.load(model, dtype, device, memory)
        columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("reading", total=None)
            held, about = files.prefill(
                source,
                text,
                cache,
                stats=stats,
                chunk=chunk,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        files.save_prefilled(held, about, out)
    console.print(str(held.report()), highlight=False)
    console.print(f"Saved {out}, {out.stat().st_size:,} bytes", highlight=False, soft_wrap=True)
