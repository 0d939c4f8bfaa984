"""Measure sparse reading: the speed of attention to the best blocks only, and the loss in quality.

Speed: one query token over a long quantised tier, reading everything and reading `top` tokens, selection included. Medians of
interleaved calls. Needles: passages planted among as many random keys, each with nine tenths of a query's attention when all
is read; how much of them is read sparsely. Quality: a model reads a text through `hqmq:4/top:N`, with several weights of a
block's width in its score (`tessera.attention.select.SPREAD`); measured are the loss over the exact cache's, and how many
tokens of repeated passages it predicts, as `frontier.py` measures them.

Example:

    python benchmarks/sparse_reading.py
    python benchmarks/sparse_reading.py --model SMOLLM2 --text wikitext-2-valid.txt --length 8192
    python benchmarks/sparse_reading.py --part speed    # keeps the other parts of the JSON
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from frontier import Bench
from tessera import codecs
from tessera.attention import select
from tessera.cli.quiet import quiet
from tessera.evaluation import Source, load, read_text
from tessera.evaluation.records import environment
from tessera.files import write_json
from tessera.kernels import AttendParams, dispatch
from tessera.models import heldout_text
from tessera.tiers import QuantizedTier
from timing import medians

ROOT = Path(__file__).resolve().parent.parent
#: Query heads, key heads, head_dim.
HEADS = (32, 8, 128)
TOP = 2048
#: Share of a query's attention that a planted passage has when all is read.
WEIGHT = 0.9
#: Lengths of planted passages, and deviations of what the keys of a block have in common.
PASSAGES, DRIFTS = (1, 8, 32), (0.0, 1.0)
SPREADS = (0.0, 0.5, 1.0, 1.5, 2.0)


def speed(tokens: int, repeats: int) -> dict[str, Any]:
    """Time one token's attention over this many tokens, reading all and reading the best, in milliseconds."""
    heads, kv_heads, dim = HEADS
    tier = QuantizedTier(codecs.get("hqmq:4"), 0)
    for _ in range(tokens // 8192):
        tier.append(*torch.randn(2, 1, kv_heads, 8192, dim).unbind(0))
    q, pages, params = torch.randn(1, heads, 1, dim), tier.view, AttendParams(dim**-0.5)

    def sparse() -> object:
        return dispatch.attend(q, pages, replace(params, mask=select.selected(q, pages, TOP, params)))

    found = medians({"all": lambda: dispatch.attend(q, pages, params), "best": sparse}, repeats)
    return {"tokens": tokens, "top": TOP, "ms": {name: 1e3 * seconds for name, seconds in found.items()}}


def needles(tokens: int, passage: int, repeats: int, drift: float) -> dict[str, Any]:
    """Plant passages among random keys, each with `WEIGHT` of a query's attention when all is read; count those read sparsely.

    Args:
        tokens: keys.
        passage: number of adjacent keys that share the weight.
        repeats: number of draws, with 8 passages each.
        drift: standard deviation, relative to that of a key, of what the 64 keys of a block have in common. Keys of real models
            have much in common with their neighbours; independent keys have nothing.

    Returns:
        with the arguments, the share of the passages' attention that falls into the selected blocks.
    """
    kv_heads, dim, kept = HEADS[1], HEADS[2], []
    for _ in range(repeats):
        q, k = torch.randn(kv_heads, dim), torch.randn(kv_heads, tokens, dim)
        k += drift * torch.randn(kv_heads, tokens // 64, dim).repeat_interleave(64, 1)
        scores = torch.einsum("hd,htd->ht", q, k) * dim**-0.5
        places = torch.randint(tokens - passage, (kv_heads,))
        for head, place in enumerate(places.tolist()):
            # Each key of the passage gets the same score, by a shift along the query.
            wanted = scores[head].logsumexp(0) + math.log(WEIGHT / (1 - WEIGHT) / passage)
            shift = (wanted - scores[head, place : place + passage]) * dim**0.5 / q[head].square().sum()
            k[head, place : place + passage] += shift[:, None] * q[head]
        tier = QuantizedTier(codecs.get("hqmq:4"), 0)
        tier.append(k[None], torch.zeros_like(k)[None])
        read = select.selected(q[None, :, None], tier.view, TOP, AttendParams(dim**-0.5))[0, :, 0]
        kept += [read[head, place : place + passage].float().mean() for head, place in enumerate(places.tolist())]
    share = float(torch.stack(kept).mean())
    return {"tokens": tokens, "passage": passage, "drift": drift, "weight": WEIGHT, "passages": len(kept), "kept": share}


def quality(source: Source, text: str, length: int, tops: Sequence[int], chunk: int) -> list[dict[str, Any]]:
    """Measure loss and recall by tokens read, for several weights of a block's width."""
    bench, rows = Bench(source, None, text, chunk), []
    plan = [(0, select.SPREAD), *((top, spread) for top in tops for spread in SPREADS)]
    for top, spread in track(plan, "reading", console=Console(stderr=True), transient=True):
        select.SPREAD = spread
        rule = f"/top:{top}" if top else ""
        spec = f"sink:4 + hqmq:4{rule} + recent:128"
        rows.append({"top": top, "spread": spread, **bench.run({"model": source.name, "length": length, "spec": spec})})
    return rows


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[32768, 65536, 131072])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--model", help="folder of a transformers model; without it: the demo model")
    parser.add_argument("--text", help="text to read  [default: the demo model's held-out text]")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--tops", type=int, nargs="+", default=[2048, 1024], help="how many tokens are read")
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--draws", type=int, default=8, help="draws of 8 planted passages each")
    parser.add_argument("--part", choices=("speed", "needles", "quality"), help="measure only this part again  [default: all]")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "sparse_reading.json")
    options = parser.parse_args()
    if options.part and not options.json.is_file():
        parser.error(f"--part: there is no {options.json} to keep the other parts of; measure all first")
    quiet()
    torch.manual_seed(0)
    found = json.loads(options.json.read_text(encoding="utf-8")) if options.part else {}
    if options.part in (None, "speed"):
        sizes = track(options.tokens, "timing", console=Console(stderr=True), transient=True)
        found |= {"environment": environment(), "heads": HEADS, "speed": [speed(tokens, options.repeats) for tokens in sizes]}
    if options.part in (None, "needles"):
        plan = [(tokens, passage, drift) for drift in DRIFTS for passage in PASSAGES for tokens in options.tokens]
        trials = track(plan, "planting", console=Console(stderr=True), transient=True)
        found["needles"] = [needles(tokens, passage, options.draws, drift) for tokens, passage, drift in trials]
    if options.part in (None, "quality"):
        text = heldout_text() if options.text is None else read_text([options.text])[0]
        found["quality"] = quality(load(options.model), text, options.length, options.tops, options.chunk)
    write_json(options.json, found)
    table = Table("tokens", "all, ms", f"best {TOP:,}, ms", "times as fast")
    for row in found.get("speed", []):
        ms = row["ms"]
        table.add_row(f"{row['tokens']:,}", f"{ms['all']:.2f}", f"{ms['best']:.2f}", f"{ms['all'] / ms['best']:.2f}")
    Console().print(table)
    table = Table("tokens", "passage", "in common", "read")
    for row in found.get("needles", []):
        table.add_row(f"{row['tokens']:,}", str(row["passage"]), f"{row['drift']:g}", f"{row['kept']:.0%}")
    Console().print(table)
    table = Table("read", "width", "loss, nats", "recall")
    for row in found.get("quality", []):
        read = f"{row['top']:,}" if row["top"] else "all"
        table.add_row(read, f"{row['spread']:g}", f"{row['loss']:+.4f} ± {row['error']:.4f}", f"{row['recall']:.1%}")
    Console().print(table)
    Console().print(f"Saved {options.json}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
