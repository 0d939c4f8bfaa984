"""Measure loss and recall against the total bytes of a cache, for every retention policy.

Each cache reads a text in chunks, as generation does, and after it short passages of the same text a second time, one for every
256 tokens, from all depths. The loss is over the second half of the text, minus that of the exact cache over the same tokens;
by then every policy that drops tokens has dropped some. Recall is the share of the repeated tokens that the model predicts
after the first few of their passage; the share that it predicts when it reads them for the first time is measured with the
exact cache. Bytes count all that the cache holds at the end, exact tiers and free space included. Each row is saved when it is
measured, and an interrupted run resumes.

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
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import tessera
from tessera.cli.quiet import quiet
from tessera.evaluation import Source, load, read_text
from tessera.evaluation.loading import encode
from tessera.evaluation.standard_errors import standard_error
from tessera.lab.evaluation.jobs import Job, Row, resume
from tessera.models import demo_memory_path, heldout_text
from tessera.tiers.per_layer import parse

ROOT = Path(__file__).resolve().parent.parent
JSON, PICTURE = ROOT / "docs" / "results" / "frontier.json", ROOT / "docs" / "images" / "frontier.png"
#: Length of a repeated passage, of its unscored beginning, and of the stretch of text for each passage, in tokens.
PASSAGE, CUE, SPACE = 32, 8, 256
DEMO = "demo model"
#: Kinds of policies: label, colour, and a marker that distinguishes them without colours.
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
#: Labels in the picture of kinds that the JSON names otherwise.
LABELS = {"codec, at most so many": "codec, limited length"}


def policies(length: int, memory: bool) -> dict[str, str]:
    """Return cache specifications for texts of a length, and the kind of each."""
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


def passages(length: int) -> Tensor:
    """Return where the repeated passages begin, (passages,): the even ones in order, then the odd ones in reverse."""
    count = length // SPACE
    depth = (torch.arange(count) + 0.5) / count
    begin = (depth * (length - count * PASSAGE - PASSAGE)).long()
    return torch.cat([begin[::2], begin[1::2].flip(0)])


def read(source: Source, spec: str, ids: Tensor, chunk: int) -> tuple[Tensor, Tensor, int]:
    """Read tokens through a cache, `chunk` tokens per call.

    Returns:
        negative log-likelihoods (tokens - 1,), whether the likeliest token was right (tokens - 1,), and the bytes of the cache.
    """
    cache, nll, right = tessera.Cache(spec, source.model), [], []
    with torch.inference_mode():
        for begin in range(0, len(ids), chunk):
            part, wanted = ids[begin : begin + chunk], ids[begin + 1 : begin + chunk + 1]
            logits = source.model(part[None], past_key_values=cache).logits[0, : len(wanted)].float()
            nll.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none").double())
            right.append(logits.argmax(-1) == wanted)
    return torch.cat(nll), torch.cat(right), cache.report().nbytes


class Bench:
    """A model on which jobs are run.

    Args:
        source: model without a memory.
        remembering: the same model with its Tensor Cache, for policies that use one, or None.
        text: text to read.
        chunk: tokens per call.
    """

    def __init__(self, source: Source, remembering: Source | None, text: str, chunk: int) -> None:
        self.source, self.remembering, self.chunk = source, remembering, chunk
        self.ids = encode(source.tokenizer, text)
        self.exact = lru_cache(maxsize=None)(lambda length: read(source, "dense", self._ids(length), chunk)[:2])

    def _ids(self, length: int) -> Tensor:
        """Return this many tokens of the text, followed by the repeated passages."""
        begin = passages(length)
        again = (begin[:, None] + torch.arange(PASSAGE)).flatten()
        return torch.cat([self.ids[: length - len(again)], self.ids[again]])

    def run(self, job: Job) -> Row:
        """Measure one policy at one length."""
        spec, length = job["spec"], job["length"]
        source = self.remembering if parse(spec).tensor_cache and self.remembering is not None else self.source
        nll, right, nbytes = read(source, spec, self._ids(length), self.chunk)
        exact, seen = self.exact(length)
        begin = passages(length)
        text = length - len(begin) * PASSAGE
        gap = (nll - exact)[None, text // 2 : text - 1]
        asked = torch.arange(CUE, PASSAGE) - 1  # position i predicts token i + 1
        first = seen[(begin[:, None] + asked).flatten()]
        again = right[(text + PASSAGE * torch.arange(len(begin))[:, None] + asked).flatten()]
        shares = {"recall": float(again.double().mean()), "first": float(first.double().mean())}
        return {**job, "nbytes": nbytes, "loss": float(gap.mean()), "error": standard_error(gap), **shares}


def key(job: Job) -> tuple[Any, ...]:
    """Return what identifies a run."""
    return tuple(job[name] for name in ("model", "length", "spec"))


def draw(rows: list[Row], path: Path) -> None:
    """Draw loss and recall against bytes, a row of two panels for each model and length, pretrained models first."""
    found = sorted(dict.fromkeys((row["model"], row["length"]) for row in rows), key=lambda one: (one[0] == DEMO, *one))
    figure = Figure(figsize=(9, 3.1 * len(found) + 1.1), layout="constrained")
    panels = figure.subplots(len(found), 2, squeeze=False)
    for (loss, recall), (model, length) in zip(panels, found, strict=True):
        own = [row for row in rows if (row["model"], row["length"]) == (model, length)]
        for kind, (colour, marker) in KINDS.items():
            points = [row for row in own if row["kind"] == kind]
            x, lost = [row["nbytes"] / 2**20 for row in points], [row["loss"] for row in points]
            loss.scatter(x, lost, color=colour, marker=marker, s=42, label=LABELS.get(kind, kind), zorder=3)
            loss.errorbar(x, lost, [row["error"] for row in points], fmt="none", ecolor=colour, lw=0.8, zorder=2)
            recall.scatter(x, [100 * row["recall"] for row in points], color=colour, marker=marker, s=42, zorder=3)
        loss.set_yscale("symlog", linthresh=0.001)
        loss.set_ylabel("loss over exact, nats per token", fontsize=9)
        recall.axhline(100 * own[0]["first"], color="#000000", lw=1, ls=":")
        where = {"xy": (0.02, 100 * own[0]["first"]), "xycoords": ("axes fraction", "data")}
        recall.annotate("first reading", **where, xytext=(0, 2), textcoords="offset points", ha="left", va="bottom", fontsize=8)
        recall.set_ylabel("repeated tokens predicted, %", fontsize=9)
        for axis in (loss, recall):
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.margins(0.1)
            axis.grid(alpha=0.25)
            axis.set_xlabel("size of the cache, MiB", fontsize=9)
            axis.set_title(f"{model}, {length:,} tokens", fontsize=10)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Measure, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a transformers model; without it: the demo model")
    parser.add_argument("--name", help="name of the model in tables  [default: its folder]")
    parser.add_argument("--text", type=Path, help="text to read  [default: the demo model's held-out text]")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--chunk", type=int, default=256, help="tokens per call")
    parser.add_argument("--json", type=Path, default=JSON)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--draw", action="store_true", help="only draw the picture from the JSON")
    options = parser.parse_args()
    if too_short := [length for length in options.lengths if length < 2 * SPACE]:
        parser.error(f"--lengths: {too_short[0]} tokens are too few; at least {2 * SPACE} have passages that can be read again")
    if options.draw and not options.json.is_file():
        parser.error(f"--draw: there is no {options.json}; measure first, without --draw")
    quiet()
    rows: list[Row] = []
    jobs: list[Job] = []
    demo = options.model is None
    name = DEMO if demo else options.name or options.model.name
    for length in [] if options.draw else options.lengths:
        for spec, kind in policies(length, demo).items():
            jobs.append({"model": name, "length": length, "spec": str(parse(spec)), "kind": kind})
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
        for rows in resume(jobs, options.json, run, key, {"passage": PASSAGE, "cue": CUE, "chunk": options.chunk}):
            already = len(rows) if already is None else already
            progress.update(bar, completed=len(rows) - already)
    table = Table("model", "tokens", "cache", "MiB", "loss, nats", "recall", "at first sight")
    for row in rows:
        loss = f"{row['loss']:+.4f} ± {row['error']:.4f}"
        shares = (f"{row[name]:.1%}" for name in ("recall", "first"))
        table.add_row(row["model"], f"{row['length']:,}", row["spec"], f"{row['nbytes'] / 2**20:.2f}", loss, *shares)
    Console().print(table)
    draw(rows, options.picture)
    Console().print(f"Saved {options.json} and {options.picture}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
