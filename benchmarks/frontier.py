"""What is lost beyond the window, and what is still recalled, against the total bytes of a cache, for every policy there is.

A text is read into each cache as generation reads it, a chunk a call. The loss is over the second half of the text, less that
of the exact cache over the same tokens: there, everything that drops tokens has dropped some. Recall is of needles hidden at
three depths of a text as long: the mean negative log-likelihood of what is hidden, when it is asked for. Bytes are all that the
cache holds at the end, exact tiers and free room included. Rows are written one by one; a run that was cut short goes on.

Example:

    python benchmarks/frontier.py                                        # the demo model, 2,048 to 16,384 tokens
    python benchmarks/frontier.py --model FOLDER --name SmolLM2-135M --text wikitext-2-valid.txt --lengths 8192
    python benchmarks/frontier.py --draw                                 # only the picture, from the JSON
"""

from __future__ import annotations

import argparse
import sys
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import tessera
from tessera.cache.per_layer import parse
from tessera.cli.quiet import quiet
from tessera.evaluation import Source, load, read_text
from tessera.evaluation.errors import standard_error
from tessera.evaluation.sources import encode
from tessera.lab.evaluation.jobs import Job, Row, resume
from tessera.lab.evaluation.long_context import answer
from tessera.lab.tasks.long_context import fit, needle
from tessera.models import demo_memory_path, heldout_text

ROOT = Path(__file__).resolve().parent.parent
JSON, PICTURE = ROOT / "docs" / "results" / "frontier.json", ROOT / "docs" / "images" / "frontier.png"
DEPTHS = (0.1, 0.5, 0.9)
#: Kinds of policies: what they are called, and their colour and marker, told apart by readers who see no colours too.
KINDS = {
    "exact": ("#000000", "*"),
    "window without sinks": ("#999999", "x"),
    "window": ("#56B4E9", "s"),
    "codec": ("#0072B2", "o"),
    "other codec": ("#E69F00", "D"),
    "codecs by age": ("#009E73", "P"),
    "codec, at most so many": ("#CC79A7", "v"),
    "codec, read sparsely": ("#D55E00", "^"),
    "window and Tensor Cache": ("#7B3294", "<"),
    "codec and Tensor Cache": ("#A6761D", ">"),
}


def policies(length: int, memory: bool) -> dict[str, str]:
    """Cache specifications for texts of a length, and the kind of each."""
    sink, recent = ("sink:4 + ", " + recent:128")
    found = {"dense": "exact"}
    for part in (16, 8, 4, 2):
        found[f"{sink}window:{length // part}"] = "window"
    found[f"window:{length // 4}"] = "window without sinks"
    for codec in ("hqmq:3", "hqmq:4", "hqmq:5"):
        found[f"{sink}{codec}{recent}"] = "codec"
    for codec in ("q4_0", "kivi:4", "scalar:4", "fp8"):
        found[f"{sink}{codec}{recent}"] = "other codec"
    found[f"{sink}hqmq:4@{length // 4} + hqmq:3{recent}"] = "codecs by age"
    for part in (4, 2):
        found[f"{sink}hqmq:3@{length // part}{recent}"] = "codec, at most so many"
        found[f"{sink}hqmq:4/top:{length // part // 2}{recent}"] = "codec, read sparsely"
    if memory:
        found["sink:4 + window:256 + tc"] = "window and Tensor Cache"
        for part in (8, 4):
            found[f"{sink}hqmq:3@{length // part}{recent} + tc"] = "codec and Tensor Cache"
    return found


def losses(source: Source, spec: str, ids: Tensor, chunk: int) -> tuple[Tensor, int]:
    """Negative log-likelihoods (tokens - 1,) of a text read through a cache, and the bytes of the cache at the end."""
    cache, found = tessera.Cache(spec, source.model), []
    with torch.inference_mode():
        for begin in range(0, len(ids), chunk):
            part, wanted = ids[begin : begin + chunk], ids[begin + 1 : begin + chunk + 1]
            logits = source.model(part[None], past_key_values=cache).logits[0, : len(wanted)].float()
            found.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none").double())
    return torch.cat(found), cache.report().nbytes


class Bench:
    """Runs jobs on one model.

    Args:
        source: the model without a memory.
        remembering: the same with its Tensor Cache, for policies that have one; None: there is none.
        text: to be read.
        chunk: tokens of a call.
    """

    def __init__(self, source: Source, remembering: Source | None, text: str, chunk: int) -> None:
        self.source, self.remembering, self.chunk = source, remembering, chunk
        self.ids = encode(source.tokenizer, text)
        self.exact = lru_cache(maxsize=None)(lambda length: losses(source, "dense", self.ids[:length], chunk)[0])

    def run(self, job: Job) -> Row:
        """One policy at one length."""
        spec, length = job["spec"], job["length"]
        source = self.remembering if parse(spec).tensor_cache and self.remembering is not None else self.source
        if job["ask"] == "needle":
            return {**job, **self._needles(source, spec, length, job["count"])}
        nll, nbytes = losses(source, spec, self.ids[:length], self.chunk)
        gap = (nll - self.exact(length))[None, length // 2 :]
        return {**job, "nbytes": nbytes, "loss": float(gap.mean()), "error": standard_error(gap)}

    def _needles(self, source: Source, spec: str, length: int, count: int) -> Row:
        nats = []
        for number in range(count):
            for depth in DEPTHS:
                prompt = fit(needle(depth), source.tokenizer, length, f"frontier {length} {number}")
                cache = tessera.Cache(spec, source.model)
                nats.append(answer(source, prompt, cache, 1, self.chunk)[0])
        return {"nbytes": cache.report().nbytes, "nats": nats}


def key(job: Job) -> tuple[Any, ...]:
    """What tells one run from another."""
    return tuple(job[name] for name in ("model", "length", "spec", "ask", "count"))


def draw(rows: list[Row], path: Path) -> None:
    """Loss against bytes, a panel for each model and length, and behind these recall where it was measured."""
    names = {"loss": "loss over the exact cache's, nats a token", "nats": "needle, nats a token"}
    found = dict.fromkeys((name, row["model"], row["length"]) for name in names for row in rows if name in row)
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.1 * lines + 1.1), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, (name, model, length) in zip(axes, found, strict=False):
        own = [row for row in rows if name in row and (row["model"], row["length"]) == (model, length)]
        for kind, (colour, marker) in KINDS.items():
            points = [row for row in own if row["kind"] == kind and (kind != "exact" or name == "nats")]
            x = [row["nbytes"] / 2**20 for row in points]
            y = [row[name] if name == "loss" else mean(row[name]) for row in points]
            if points:
                axis.scatter(x, y, color=colour, marker=marker, s=42, label=kind, zorder=3)
            if points and name == "loss":
                axis.errorbar(x, y, [row["error"] for row in points], fmt="none", ecolor=colour, lw=0.8, zorder=2)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_yscale("symlog", linthresh=0.001 if name == "loss" else 0.1)
        axis.margins(0.1)
        axis.grid(alpha=0.25)
        axis.set_xlabel("all bytes of the cache, MiB")
        axis.set_ylabel(names[name], fontsize=9)
        axis.set_title(f"{model}, {length:,} tokens", fontsize=10)
    for axis in axes[len(found) :]:
        axis.set_visible(False)
    legend = {label: handle for a in axes for handle, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Measure, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a transformers model; without it: the demo model")
    parser.add_argument("--name", help="what the model is called in tables; without it: its folder")
    parser.add_argument("--text", type=Path, help="to be read; without it: the text that the demo model never saw")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--needles", type=int, default=0, help="needles at each depth, which take as long as so many texts")
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a call")
    parser.add_argument("--json", type=Path, default=JSON)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--draw", action="store_true", help="measure nothing, draw what there is")
    options = parser.parse_args()
    quiet()
    rows: list[Row] = []
    jobs: list[Job] = []
    demo = options.model is None
    name = "demo model" if demo else options.name or options.model.name
    asked = [("text", 1), *([("needle", options.needles)] if options.needles else [])]
    for ask, count in [] if options.draw else asked:
        for length in options.lengths:
            for spec, kind in policies(length, demo).items():
                about = {"model": name, "length": length, "spec": str(parse(spec)), "kind": kind}
                jobs.append({**about, "ask": ask, "count": count})
    source = None if options.draw else load(None if demo else str(options.model))
    if source is None:
        run: Any = None
    else:
        remembering = load(memory=demo_memory_path()) if demo else None
        text = heldout_text() if options.text is None else read_text([options.text])[0]
        run = Bench(source, remembering, text, options.chunk).run
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("reading", total=len(jobs))
        already: int | None = None
        for rows in resume(jobs, options.json, run, key, {"depths": DEPTHS}):
            already = len(rows) if already is None else already
            progress.update(bar, completed=len(rows) - already)
    table = Table("model", "tokens", "cache", "MiB", "loss, nats", "needle, nats")
    for row in rows:
        nats = f"{mean(row['nats']):.2f}" if "nats" in row else ""
        loss = f"{row['loss']:+.4f} ± {row['error']:.4f}" if "loss" in row else ""
        table.add_row(row["model"], f"{row['length']:,}", row["spec"], f"{row['nbytes'] / 2**20:.2f}", loss, nats)
    Console().print(table)
    draw(rows, options.picture)
    Console().print(f"Saved {options.json} and {options.picture}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
