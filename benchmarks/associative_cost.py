"""What the Tensor Cache costs: the chunk-parallel scan against the token loop that defines it, and streams of any length.

1. Forward, and forward with backward, at growing lengths: linear, and many times faster than the loop.
2. A stream through `tessera.Cache`: bytes of state and tokens per second against the tokens seen, for a dense cache, a
   window, and a window with a Tensor Cache behind it; and the growth of the process.

Example:

    python benchmarks/associative_cost.py
    python benchmarks/associative_cost.py --stream 4096 --lengths 1024   # a minute
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize

import tessera
from tessera.associative.recurrence import loop
from tessera.associative.scan import scan
from tessera.evaluation.records import environment
from tessera.files import atomic_path
from tessera.models.gpt import GPT, GPTConfig
from timing import medians

ROOT = Path(__file__).resolve().parent.parent
RULES = ("outer", "delta")
HEADS, DIM = 2, 64
SPECS = ("dense", "window:256", "sink:4 + window:256 + tc")
#: Tokens given to the model in one call while a stream grows.
CALL = 256


def inputs(tokens: int) -> list[Tensor]:
    """q, k, v, g, eta and the state, as leaves of a graph."""
    k = normalize(torch.randn(1, HEADS, tokens, DIM), dim=-1)
    x = [torch.randn(1, HEADS, 1, tokens, DIM), k, torch.randn(1, HEADS, tokens, DIM)]
    x += [torch.full((1, HEADS, tokens), -1e-3), torch.full((1, HEADS, tokens), 0.5), torch.zeros(1, HEADS, DIM, DIM)]
    return [t.requires_grad_() for t in x]


def scans(tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of one length: both rules, forward and with backward."""
    x = inputs(tokens)
    runs: dict[str, Callable[[], object]] = {}
    for rule in RULES:
        for name, form in (("loop", loop), ("scan", scan)):

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
            slow, fast = seconds[f"{rule}/{way}/loop"], seconds[f"{rule}/{way}/scan"]
            rows.append(
                {"tokens": tokens, "rule": rule, "way": way, "loop_ms": 1e3 * slow, "scan_ms": 1e3 * fast, "times": slow / fast}
            )
    return rows


def resident() -> int:
    """Bytes of this process in physical memory."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["VmRSS"].split()[0]) * 1024


@torch.inference_mode()
def stream(spec: str, limit: int, dense_limit: int, step: Callable[[], None]) -> list[dict[str, Any]]:
    """Rows of one cache, at 1k tokens and every doubling."""
    torch.manual_seed(0)
    config = GPTConfig(
        attention="sink:4 + window:256 + tc",
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1 << 21,
    )
    model = GPT(config).eval()
    cache = tessera.Cache(spec, model)
    rows, seen, mark = [], 0, 1024
    before = resident()
    while seen < (dense_limit if spec == "dense" else limit):
        began = time.perf_counter()
        while seen < mark:
            model(torch.randint(256, (1, CALL)), past_key_values=cache, logits_to_keep=1)
            seen += CALL
            step()
        speed = (mark - mark // 2 if mark > 1024 else mark) / (time.perf_counter() - began)
        row = {"spec": spec, "tokens": seen, "nbytes": cache.report().nbytes, "tokens_per_second": speed}
        rows.append({**row, "process_growth": resident() - before})
        mark *= 2
    return rows


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=(1024, 2048, 4096))
    parser.add_argument("--stream", type=int, default=1 << 20, help="tokens of the bounded streams")
    parser.add_argument("--dense", type=int, default=1 << 15, help="tokens of the dense stream, whose cost grows")
    parser.add_argument("--repeats", type=int, default=5, help="of which the median is taken")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "associative_cost.json")
    options = parser.parse_args()
    record: dict[str, Any] = {"environment": environment(), "heads": HEADS, "head_dim": DIM, "scan": [], "stream": []}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("scanning", total=len(options.lengths))
        for tokens in options.lengths:
            record["scan"] += scans(tokens, options.repeats)
            progress.advance(bar)
        calls = (2 * options.stream + min(options.dense, options.stream)) // CALL
        bar = progress.add_task("streaming", total=calls)
        for spec in SPECS:
            record["stream"] += stream(spec, options.stream, options.dense, lambda: progress.advance(bar))
            with atomic_path(options.json) as temporary:
                temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    table = Table("tokens", "rule", "way", "loop, ms", "scan, ms", "times faster")
    for r in record["scan"]:
        cells = (f"{r['tokens']:,}", r["rule"], r["way"], f"{r['loop_ms']:.0f}", f"{r['scan_ms']:.1f}", f"{r['times']:.0f}")
        table.add_row(*cells)
    Console().print(table)
    table = Table("cache", "tokens", "bytes", "tokens/s", "growth of the process")
    for r in record["stream"]:
        numbers = (f"{r['tokens']:,}", f"{r['nbytes']:,}", f"{r['tokens_per_second']:.0f}", f"{r['process_growth']:,}")
        table.add_row(r["spec"], *numbers)
    Console().print(table)
    Console().print(f"Saved {options.json}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
