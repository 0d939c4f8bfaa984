"""`tessera stats`: statistics of a model's keys, for caches that should compress from the first token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tessera.cli.errors import one_line_errors


def stats(
    model: Annotated[
        str | None, typer.Option(help="Folder, GGUF file or hub name of a causal language model.  [default: the demo model]")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text files.  [default: held-out standard-library modules]")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to read.", min=64)] = 2048,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or float16.  [default: float32 on a CPU, else auto]")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    out: Annotated[Path, typer.Option(help="File of the statistics.")] = Path("results/stats.safetensors"),
) -> None:
    """Measure how much a model's queries use each channel of its keys, one byte a channel, and write it to a file.

    A cache with a codec such as hqmq:4 learns this from its own first 128 tokens, which stay exact until then. Given the file,
    as tessera.Cache(spec, model, stats="stats.safetensors") or with --stats, it compresses from the first token, in every
    sequence alike.

    Example:

        tessera stats --model ./my-model --text book.txt --out stats.safetensors

        tessera generate --model ./my-model --stats stats.safetensors --prompt "Once upon a time"
    """
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from tessera.cli.quiet import quiet

    quiet()
    from tessera import evaluation
    from tessera.codecs.channel_stats import save_stats
    from tessera.evaluation.key_stats import measure_stats

    console = Console()
    with one_line_errors():
        content, name = evaluation.read_text(text or ())
        source = evaluation.load(model, dtype, device)
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("measuring", total=None)
            found = measure_stats(source, content, tokens, lambda done, total: bar.update(task, completed=done, total=total))
        save_stats(found, out)
    table = Table("layer", "key heads", "widest : narrowest channel", title=f"{source.name}, on {name}", title_justify="left")
    for layer, one in enumerate(found):
        ratio = (one.widths.amax(-1) / one.widths.amin(-1)).max()
        table.add_row(str(layer), str(one.sizes.shape[1]), f"{ratio:.1f}")
    console.print(table)
    console.print(f"Saved {out}, {sum(one.nbytes for one in found):,} bytes of statistics", highlight=False, soft_wrap=True)
