"""Time implementations of attention of many queries on a CPU, by codec, heads and number of queries.

"kernel" multiplies codes directly; "tiled" decodes a tile and passes it to PyTorch's flash attention; "definition" is plain
matrix products and a softmax. For exact keys "tiled" is flash attention alone; with a window the queries are the newest
tokens. `tessera.kernels.cpu.tiled` chooses by these figures. Times are processor times, so that a busy machine affects them
little; each is a median.

Example:

    OMP_NUM_THREADS=1 python benchmarks/prefill_attention.py
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tessera import codecs
from tessera.evaluation.records import environment
from tessera.files import write_json
from tessera.kernels import AttendParams, CompressedKV, cpu, reference
from tessera.kernels.cpu import tiled

ROOT = Path(__file__).resolve().parent.parent
WINDOWED = "exact, window of 512"
SPECS = ("exact", WINDOWED, "hqmq:4", "hqmq:s96_r4", "q4_0", "kivi:4")
#: (query heads, key heads, head_dim).
SHAPES = ((9, 3, 64), (32, 8, 128))
QUERIES = (1, 8, 32, 128, 512)
PARAMS = AttendParams(0.1)


def ways(spec: str, shape: tuple[int, int, int], queries: int, tokens: int) -> dict[str, Callable[[], object]]:
    """Return the implementations that can be used for these queries and this many tokens."""
    heads, kv_heads, dim = shape
    q = torch.randn(1, heads, queries, dim)
    k, v = torch.randn(2, 1, kv_heads, tokens, dim).unbind(0)
    found: dict[str, Callable[[], object]] = {}
    if spec in ("exact", WINDOWED):
        params = PARAMS if spec == "exact" else replace(PARAMS, start=tokens - queries, window=512)
        if cpu.attend_exact_refusal(q, k, v) is None:
            found["kernel"] = lambda: cpu.attend_exact(q, k, v, params)
        found["tiled"] = lambda: tiled.attend_exact_tiled(q, k, v, params)
        found["definition"] = lambda: reference.attend_exact(q, k, v, params)
        return found
    codec = codecs.get(spec)
    pages = CompressedKV([(codec.encode(k, "key"), codec.encode(v, "value"))])
    if cpu.attend_refusal(q, pages) is None:
        for level in cpu.levels():
            found[f"kernel, {level}"] = lambda level=level: cpu.attend(q, pages, PARAMS, level=level)
    found["tiled"] = lambda: tiled.attend_tiled(q, pages, PARAMS)
    found["definition"] = lambda: reference.attend(q, pages, PARAMS)
    return found


def processor_ms(call: Callable[[], object], repeats: int) -> float:
    """Return the median processor milliseconds of a call."""
    call()
    took = []
    for _ in range(repeats):
        began = time.process_time()
        call()
        took.append(1e3 * (time.process_time() - began))
    return median(took)


@torch.inference_mode()
def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--specs", nargs="+", default=SPECS)
    parser.add_argument("--queries", type=int, nargs="+", default=QUERIES)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "prefill_attention.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    table = Table("keys", "heads", "queries", "ms")
    for spec in options.specs:
        for shape in SHAPES:
            for queries in options.queries:
                calls = ways(spec, shape, queries, options.tokens)
                took = {name: processor_ms(call, options.repeats) for name, call in calls.items()}
                rows.append({"spec": spec, "shape": shape, "queries": queries, "processor_ms": took})
                said = ", ".join(f"{name} {ms:.2f}" for name, ms in took.items())
                table.add_row(spec, "/".join(map(str, shape)), str(queries), said)
    write_json(options.json, {"tokens": options.tokens, "environment": environment(), "rows": rows})
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
