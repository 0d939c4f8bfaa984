"""Measure the cost of the Tensor Cache: its fast forms against the token loop that defines it, and long streams.

1. Forward, and forward with backward, at growing lengths, of the chunk-parallel scan in PyTorch and of the kernel in C++:
   linear, and many times faster than the loop.
2. A stream through `tessera.Cache`: bytes of state and tokens per second against the tokens seen, for a dense cache, a
   window, and a window with a Tensor Cache behind it; and the growth of the process's memory.

Example:

    python benchmarks/associative_cost.py
    python benchmarks/associative_cost.py --stream 4096 --lengths 1024   # a minute
    python benchmarks/associative_cost.py --stream 0   # the forms only; streams stay as the file has them
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize

from tessera.evaluation.records import environment
from tessera.files import write_json
from tessera.lab.evaluation.long_streams import SPECS, streams, streams_table
from tessera.tensor_cache.forms import recur
from tessera.tensor_cache.recurrence import loop
from tessera.tensor_cache.scan import scan
from timing import medians

ROOT = Path(__file__).resolve().parent.parent
RULES = ("outer", "delta")
FORMS: dict[str, Callable[..., Any]] = {"loop": loop, "scan": scan, "kernel": partial(recur, backend="cpu")}
HEADS, DIM = 2, 64


def inputs(tokens: int) -> list[Tensor]:
    """Return q, k, v, g, eta and the state, as tensors that require gradients."""
    k = normalize(torch.randn(1, HEADS, tokens, DIM), dim=-1)
    x = [torch.randn(1, HEADS, 1, tokens, DIM), k, torch.randn(1, HEADS, tokens, DIM)]
    x += [torch.full((1, HEADS, tokens), -1e-3), torch.full((1, HEADS, tokens), 0.5), torch.zeros(1, HEADS, DIM, DIM)]
    return [t.requires_grad_() for t in x]


def scans(tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Measure one length, for both rules, forward alone and with backward."""
    x = inputs(tokens)
    runs: dict[str, Callable[[], object]] = {}
    for rule in RULES:
        for name, form in FORMS.items():

            def forward(form: Any = form, rule: str = rule) -> Tensor:
                with torch.no_grad():
                    return form(*x, rule)[0]  # type: ignore[no-any-return]

            def both(form: Any = form, rule: str = rule) -> Any:
                return torch.autograd.grad(form(*x, rule)[0].sum(), x)

            runs[f"{rule}/forward/{name}"], runs[f"{rule}/backward/{name}"] = forward, both
    seconds = medians(runs, repeats)
    rows = []
    for rule in RULES:
        for way in ("forward", "backward"):
            ms = {name: 1e3 * seconds[f"{rule}/{way}/{name}"] for name in FORMS}
            times = {f"{name}_times": ms["loop"] / ms[name] for name in ("scan", "kernel")}
            rows.append({"tokens": tokens, "rule": rule, "way": way, **{f"{name}_ms": x for name, x in ms.items()}, **times})
    return rows


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=(1024, 2048, 4096))
    parser.add_argument("--stream", type=int, default=1 << 20, help="tokens of the bounded streams; 0: none")
    parser.add_argument("--dense", type=int, default=1 << 15, help="tokens of the dense stream, whose cost grows")
    parser.add_argument("--repeats", type=int, default=5, help="number of calls, of which the median is taken")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "associative_cost.json")
    options = parser.parse_args()
    record: dict[str, Any] = {"environment": environment(), "heads": HEADS, "head_dim": DIM, "scan": [], "stream": []}
    if not options.stream and options.json.is_file():
        record["stream"] = json.loads(options.json.read_text(encoding="utf-8"))["stream"]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("scanning", total=len(options.lengths))
        for tokens in options.lengths:
            record["scan"] += scans(tokens, options.repeats)
            progress.advance(bar)
        if options.stream:
            bar = progress.add_task("streaming", total=len(SPECS))
            record["stream"] = streams(SPECS, options.stream, options.dense, lambda: progress.advance(bar))
    write_json(options.json, record)
    table = Table("tokens", "rule", "way", "loop, ms", "scan, ms", "kernel, ms", "scan, faster", "kernel, faster")
    for r in record["scan"]:
        ms = (f"{r['loop_ms']:.0f}", f"{r['scan_ms']:.1f}", f"{r['kernel_ms']:.1f}")
        table.add_row(f"{r['tokens']:,}", r["rule"], r["way"], *ms, f"{r['scan_times']:.0f}x", f"{r['kernel_times']:.0f}x")
    Console().print(table)
    Console().print(streams_table(record["stream"]))
    Console().print(f"Saved {options.json}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
