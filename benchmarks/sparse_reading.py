"""Sparse reading: how much faster one token's attention is that reads the best blocks only, and what the choice loses.

Speed: one query token over a long quantised tier, reading everything and reading `top` tokens, choosing included. Medians of
interleaved calls. Quality: a model reads a text through `hqmq:4/top:N`, with several weights of a block's width beside its mean
(`tessera.attention.select.SPREAD`); KL is against the exact model, over the second half of the text.

Example:

    python benchmarks/sparse_reading.py
    python benchmarks/sparse_reading.py --model SMOLLM2 --text wikitext-2-valid.txt --length 4096
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import tessera
from tessera import codecs
from tessera.attention import select
from tessera.cache.tiers import QuantizedTier
from tessera.cli.quiet import quiet
from tessera.evaluation import Source, load, read_text
from tessera.evaluation.records import environment
from tessera.evaluation.sources import encode
from tessera.files import write_json
from tessera.kernels import AttendParams, dispatch
from tessera.models import heldout_text
from timing import medians

ROOT = Path(__file__).resolve().parent.parent
#: Query heads, key heads, head_dim.
HEADS = (32, 8, 128)
TOP = 2048
SPREADS = (0.0, 0.5, 1.0, 2.0)


def speed(tokens: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of one token's attention over so many, all read and the best."""
    heads, kv_heads, dim = HEADS
    tier = QuantizedTier(codecs.get("hqmq:4"), 0)
    for _ in range(tokens // 8192):
        tier.append(*torch.randn(2, 1, kv_heads, 8192, dim).unbind(0))
    q, pages = torch.randn(1, heads, 1, dim), tier.view

    def sparse() -> object:
        return dispatch.attend(q, pages, AttendParams(dim**-0.5, select.selected(q, pages, TOP)))

    found = medians({"all": lambda: dispatch.attend(q, pages, AttendParams(dim**-0.5)), "best": sparse}, repeats)
    return {"tokens": tokens, "top": TOP, "ms": {name: 1e3 * seconds for name, seconds in found.items()}}


def predictions(source: Source, spec: str, ids: Tensor, chunk: int) -> Tensor:
    """Logarithms of the probabilities of the next token over the second half of a text read through a cache."""
    cache, found = tessera.Cache(spec, source.model), []
    with torch.inference_mode():
        for begin in range(0, len(ids), chunk):
            logits = source.model(ids[None, begin : begin + chunk], past_key_values=cache).logits[0]
            if begin >= len(ids) // 2:
                found.append(logits.float().log_softmax(-1))
    return torch.cat(found)


def quality(source: Source, ids: Tensor, chunk: int) -> list[dict[str, Any]]:
    """KL of several widths of reading and weights of a block's width."""
    length, rows = len(ids), []
    exact = predictions(source, "dense", ids, chunk)
    plan = [(0, select.SPREAD), *((length // part, spread) for part in (16, 8, 4) for spread in SPREADS)]
    for top, spread in track(plan, "reading", console=Console(stderr=True), transient=True):
        select.SPREAD = spread
        rule = f"/top:{top}" if top else ""
        found = predictions(source, f"sink:4 + hqmq:4{rule} + recent:64", ids, chunk)
        kl = float((exact.exp() * (exact - found)).sum(-1, dtype=torch.float64).mean())
        rows.append({"model": source.name, "length": length, "top": top, "spread": spread, "kl": kl})
    return rows


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[32768, 65536, 131072])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--model", help="folder of a transformers model; without it: the demo model")
    parser.add_argument("--text", help="to be read; without it: the text that the demo model never saw")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "sparse_reading.json")
    options = parser.parse_args()
    quiet()
    torch.manual_seed(0)
    fast = [
        speed(tokens, options.repeats)
        for tokens in track(options.tokens, "timing", console=Console(stderr=True), transient=True)
    ]
    source = load(options.model)
    text = heldout_text() if options.text is None else read_text([options.text])[0]
    good = quality(source, encode(source.tokenizer, text)[: options.length], options.chunk)
    write_json(options.json, {"environment": environment(), "heads": HEADS, "speed": fast, "quality": good})
    table = Table("tokens", "all, ms", f"best {TOP:,}, ms", "times as fast")
    for row in fast:
        ms = row["ms"]
        table.add_row(f"{row['tokens']:,}", f"{ms['all']:.2f}", f"{ms['best']:.2f}", f"{ms['all'] / ms['best']:.2f}")
    Console().print(table)
    table = Table("read", *(f"KL, width x {spread}" for spread in SPREADS))
    for top in dict.fromkeys(row["top"] for row in good):
        own = {row["spread"]: row["kl"] for row in good if row["top"] == top}
        table.add_row(f"{top:,}" if top else "all", *(f"{own[s]:.5f}" if s in own else "" for s in SPREADS))
    Console().print(table)
    Console().print(f"Saved {options.json}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
