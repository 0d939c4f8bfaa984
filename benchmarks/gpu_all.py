"""Everything that needs a GPU, in one run of some minutes: first whether the kernels are right, then how fast they are.

1. The Triton attention against the reference, on the shapes of the tests, on the device.
2. The ways to look a codeword up, side by side.
3. One new token over a long cache: against scaled dot product attention in float16, at 4k to 128k tokens and batches of 1, 8
   and 32, as far as the memory of the device goes; called from Python, and replayed as a CUDA graph.
4. The same for a chunk of 64 new tokens.
5. The memories on the device against their definitions on the CPU, forward and backward: the scan of a Tensor Cache, with the
   kernels of flash-linear-attention too where these are installed, and a Tensor Memory.

Writes JSON after every step, so that a run that is cut short has left what it measured.

Example:

    python benchmarks/gpu_all.py --json docs/results/gpu.json
    TRITON_INTERPRET=1 python benchmarks/gpu_all.py --json gpu.json --smoke   # on a CPU, to see that the script runs
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from tessera import codecs
from tessera.associative import fused
from tessera.associative.recurrence import loop
from tessera.associative.scan import scan
from tessera.cache.tiers import PAGE
from tessera.codecs import Packed
from tessera.evaluation.records import environment
from tessera.files import atomic_path
from tessera.kernels import Pages, reference, triton
from tessera.spatial import TensorMemory, TensorMemoryConfig

SPECS = ("hqmq:3", "hqmq:4")
LENGTHS = (4096, 16384, 32768, 131072)
BATCHES = (1, 8, 32)
HEADS, KV_HEADS, DIM = 32, 8, 128
#: Seconds of repeated calls that one figure is taken from.
SECONDS = 0.3


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Median milliseconds of a call."""
    for _ in range(3):
        run()
    times: list[float] = []
    until = time.monotonic() + SECONDS
    while time.monotonic() < until or len(times) < 5:
        if device.type == "cuda":
            torch.cuda.synchronize()
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            run()
            last.record()
            torch.cuda.synchronize()
            times.append(first.elapsed_time(last))
        else:
            began = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - began))
    return sorted(times)[len(times) // 2]


def both(run: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Median milliseconds of a call, and of its launches alone: replayed as a CUDA graph, as servers decode."""
    found = {"ms": timed(run, device)}
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        found["graph_ms"] = timed(graph.replay, device)
    return found


def pages_of(spec: str, batch: int, tokens: int, dim: int, kv_heads: int, device: torch.device) -> Pages:
    """Pages of their own memory; one is encoded and copied."""
    codec = codecs.get(spec)
    size = min(PAGE, tokens)
    k, v = torch.randn(2, 1, kv_heads, size, dim).unbind(0)
    first = codec.encode(k, "key"), codec.encode(v)

    def copy(packed: Packed) -> Packed:
        fields = {n: t.to(device).expand(batch, *t.shape[1:]).contiguous() for n, t in packed.tensors.items()}
        return replace(packed, tensors=fields, shape=(batch, *packed.shape[1:]), dtype=torch.float16)

    return Pages([(copy(first[0]), copy(first[1])) for _ in range(tokens // size)])


def correctness(device: torch.device, smoke: bool) -> list[dict[str, Any]]:
    """Relative errors against the reference."""
    rows = []
    for spec in ("hqmq:2", "hqmq:2.5", "hqmq:3", "hqmq:3.5", "hqmq:4", "hqmq:5"):
        for batch, heads, kv_heads, queries, tokens, dim in (
            (2, 8, 2, 1, 1000, 64),
            (1, 28, 4, 1, 2048, 128),
            (1, 4, 2, 16, 700, 80),
            (2, 4, 4, 3, 320, 256),
        )[: 1 if smoke else 4]:
            tokens = 100 if smoke else tokens
            codec = codecs.get(spec)
            k, v = torch.randn(2, batch, kv_heads, tokens, dim).unbind(0)
            k[..., 3] += 40
            k[..., 1] *= 30
            pages = Pages([(codec.encode(k, "key"), codec.encode(v))])
            moved = Pages([(keys.to(device), values.to(device)) for keys, values in pages.pages])
            q = torch.randn(batch, heads, queries, dim)
            rule = {"start": tokens - queries, "window": tokens // 2}
            rules: dict[str, dict[str, Any]] = {"all": {}, "window": rule, "capped": {"softcap": 5.0}}
            names = [name for name in triton.LOOKUPS if name != "held" or spec != "hqmq:5"]
            ways = [(name, way, None) for name, way in rules.items()] + [(name, {}, name) for name in names]
            for name, options, lookup in ways:
                wanted, wanted_lse = reference.attend(q, pages, dim**-0.5, **options)
                out, lse = triton.attend(q.to(device), moved, dim**-0.5, **options, lookup=lookup)
                rows.append(
                    {
                        "spec": spec,
                        "shape": [batch, heads, kv_heads, queries, tokens, dim],
                        "rule": name,
                        "relative_error": float((out.cpu() - wanted).norm() / wanted.norm()),
                        "lse_error": float((lse.cpu() - wanted_lse).abs().max()),
                    }
                )
    return rows


def dense_speed(q: Tensor, tokens: int) -> dict[str, dict[str, float]]:
    """Milliseconds of PyTorch's ways over dense keys and values, which are gone afterwards."""
    batch, heads, queries, dim = q.shape
    k, v = torch.randn(2, batch, KV_HEADS, tokens, dim, device=q.device, dtype=q.dtype).unbind(0)
    folded = q.view(batch, KV_HEADS, heads // KV_HEADS * queries, dim)  # queries of a group as tokens of their key head
    return {
        "sdpa, enable_gqa": both(lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True), q.device),
        "sdpa, queries of a group folded": both(lambda: scaled_dot_product_attention(folded, k, v), q.device),
    }


def speed(device: torch.device, batch: int, tokens: int, queries: int) -> dict[str, Any]:
    """Milliseconds of the dense peer and of each codec, and ratios."""
    q = torch.randn(batch, HEADS, queries, DIM, device=device, dtype=torch.float16)
    dense = dense_speed(q, tokens)
    row: dict[str, Any] = {"batch": batch, "tokens": tokens, "queries": queries, "dense": dense}
    for spec in SPECS:
        pages = pages_of(spec, batch, tokens, DIM, KV_HEADS, device)
        found = both(lambda pages=pages: triton.attend(q, pages, DIM**-0.5), device)  # type: ignore[misc]
        times = {f"times_dense_{name}": min(way[name] for way in dense.values()) / value for name, value in found.items()}
        row[spec] = {**found, **times}
    return row


def lookups(device: torch.device, tokens: int) -> list[dict[str, Any]]:
    """Milliseconds of each way to look a codeword up, one new token, batches of one and of many."""
    rows = []
    for batch in (1, 8):
        q = torch.randn(batch, HEADS, 1, DIM, device=device, dtype=torch.float16)
        for spec in SPECS:
            pages = pages_of(spec, batch, tokens, DIM, KV_HEADS, device)
            for name in triton.LOOKUPS:
                found = both(partial(triton.attend, q, pages, DIM**-0.5, lookup=name), device)
                rows.append({"batch": batch, "tokens": tokens, "spec": spec, "lookup": name, **found})
    return rows


def memories(device: torch.device, tokens: int) -> list[dict[str, Any]]:
    """Rows of name, largest relative error of outputs and gradients against the definition, and milliseconds of both passes."""
    cases: dict[str, tuple[Any, list[Tensor], Any]] = {}
    k = normalize(torch.randn(1, 2, tokens, 64), dim=-1)
    x = [torch.randn(1, 2, 2, tokens, 64), k, torch.randn(1, 2, tokens, 64), -0.05 * torch.rand(1, 2, tokens)]
    x += [0.8 * torch.rand(1, 2, tokens), torch.randn(1, 2, 64, 64)]
    for rule in ("outer", "delta"):
        cases[f"Tensor Cache, {rule}"] = partial(scan, rule=rule), x, partial(loop, rule=rule)
        if fused.refusal(x[0].to(device), x[2], rule, "write_first") is None:
            cases[f"Tensor Cache, {rule}, flash-linear-attention"] = (
                partial(fused.fused_scan, rule=rule),
                x,
                partial(loop, rule=rule),
            )
    memory = TensorMemory(TensorMemoryConfig(), 96)
    there = deepcopy(memory).to(device)
    cases["Tensor Memory"] = there, [torch.randn(2, min(tokens, 128), 96)], memory.reference
    rows = []
    for name, (fast, inputs, definition) in cases.items():
        wanted = both_passes(definition, inputs)
        on_device = [t.to(device) for t in inputs]
        found = both_passes(fast, on_device)
        error = max(float((a.cpu() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))
        rows.append({"name": name, "relative_error": error, "ms": 1e3 * timed(partial(both_passes, fast, on_device), device)})
    return rows


def both_passes(run: Any, inputs: list[Tensor]) -> list[Tensor]:
    """The output of `run`, and the gradients of its inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = run(*leaves)[0]
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
    return [out.detach(), *(g for g in torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True) if g is not None)]


def main() -> int:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("docs/results/gpu.json"))
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to see that the script runs")
    options = parser.parse_args()
    why = triton.missing()
    if why is not None:
        parser.error(f"the Triton kernels cannot run here: {why}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "interpreter"
    record: dict[str, Any] = {"device": name, "environment": environment(), "correctness": [], "speed": []}
    console = Console()

    def save() -> None:
        with atomic_path(options.json) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    torch.manual_seed(0)
    record["correctness"] = correctness(device, options.smoke)
    worst = max(row["relative_error"] for row in record["correctness"])
    console.print(f"{name}: worst relative error of {len(record['correctness'])} cases {worst:.1e}")
    save()
    record["memories"] = memories(device, 64 if options.smoke else 1024)
    for row in record["memories"]:
        console.print(f"{row['name']}: relative error {row['relative_error']:.1e}, {row['ms']:.1f} ms forward and backward")
    save()
    if worst > 1e-2:
        console.print("The kernels are wrong; their speed does not matter.")
        return 1
    record["lookups"] = lookups(device, 64 if options.smoke else 32768)
    for row in record["lookups"]:
        ms = row.get("graph_ms", row["ms"])
        console.print(f"{row['spec']}, batch {row['batch']}, lookup {row['lookup']}: {ms:.3f} ms")
    save()
    table = Table("batch", "tokens", "new", "dense ms", *SPECS)
    cases = [(b, t, n) for n in (1, 64) for t in LENGTHS for b in BATCHES]
    for batch, tokens, queries in [(1, 256, 1)] if options.smoke else cases:
        dense_bytes = 4 * batch * KV_HEADS * tokens * DIM
        if device.type == "cuda" and 3 * dense_bytes > torch.cuda.mem_get_info()[0]:
            continue
        row = speed(device, batch, tokens, queries)
        record["speed"].append(row)
        save()
        way = "graph_ms" if device.type == "cuda" else "ms"
        cells = [f"{row[spec][way]:.3f} ({row[spec][f'times_dense_{way}']:.2f}x)" for spec in SPECS]
        dense = min(found[way] for found in row["dense"].values())
        table.add_row(str(batch), f"{tokens:,}", str(queries), f"{dense:.3f}", *cells)
    console.print(table)
    console.print(f"Saved {options.json}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
