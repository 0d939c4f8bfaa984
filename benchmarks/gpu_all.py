"""Run everything that needs a GPU in a few minutes: first check the kernels, then time them.

1. The Triton attention and decoding against the reference; attention runs twice, to detect nondeterminism.
2. The ways to read codes, for codebooks, whose codewords are looked up, and for scalar codecs, which are decoded by arithmetic
   or from small tables; and dense attention for comparison.
3. One new token over a long cache: against scaled dot product attention in float16, at 4k to 128k tokens and batches of 1, 8
   and 32, as far as device memory allows; called from Python, and replayed as a CUDA graph.
4. The same for 4, 16 and 64 new tokens, and for keys with a channel wide enough to be narrowed.
5. The nearest-codeword search against brute force.
6. The memories on the device against their definitions on the CPU, forward and backward: the scan of a Tensor Cache, with the
   kernels of flash-linear-attention too where these are installed, and a Tensor Memory.

Cases that have not begun after `--minutes` are listed as skipped. Before every timed call other data goes through the
device's cache, as that of other layers does. JSON is written after every case, so an interrupted run keeps its results; a
case that fails is recorded with its error and the others run. The tests cover the kernels' edge cases: run `python -m pytest
tests/kernels/test_triton.py` on the device as well.

Example:

    python benchmarks/gpu_all.py --json docs/results/gpu.json
    TRITON_INTERPRET=1 python benchmarks/gpu_all.py --json gpu.json --smoke   # on a CPU, to see that the script runs
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from tessera import codecs
from tessera.codecs import Packed
from tessera.codecs.codebooks import joint
from tessera.evaluation.records import environment
from tessera.files import write_json
from tessera.kernels import AttendParams, CompressedKV, reference, triton
from tessera.kernels.nearest import brute_force, build_index
from tessera.kernels.triton.formats import Readable, lookups, readable, usual_lookup
from tessera.tensor_cache import fused
from tessera.tensor_cache.recurrence import loop
from tessera.tensor_cache.scan import scan
from tessera.tensor_memory import TensorMemory, TensorMemoryConfig
from tessera.tiers import PAGE

#: Codecs whose nearest-codeword search is measured.
BOOKS = ("hqmq:3", "hqmq:4")
#: Codecs for which every way to read codes is measured.
READ = (*BOOKS, "scalar:3", "scalar:4", "int:4", "int:8", "fp8", "q4_0", "q8_0", "kivi:4")
#: Codecs whose attention is compared with the reference, on all shapes and on the smallest and the largest.
CHECKED = ("hqmq:4", "hqmq:3", "hqmq:2", "hqmq:2.5", "hqmq:3.5", "hqmq:5")
CHECKED_BRIEFLY = ("scalar:4", "scalar:3", "int:4", "int:7", "int:8", "fp8", "q4_0", "q8_0", "kivi:4", "kivi:3")
#: The same with keys and values of two formats.
PAIRS = ("(k=q8_0,v=hqmq:3)", "(k=hqmq:4,v=scalar:3)", "(k=kivi:4,v=int:4)")
#: Name -> codec, and the factor of one channel of the keys.
KEYS = {
    **{spec: (spec, 1.0) for spec in ("hqmq:3", "hqmq:4", "scalar:4", "int:4", "q4_0")},
    "hqmq:4, a wide channel": ("hqmq:4", 30.0),
}
LENGTHS = (4096, 16384, 32768, 131072)
BATCHES = (1, 8, 32)
HEADS, KV_HEADS, DIM = 32, 8, 128
#: Seconds of repeated calls for each figure.
SECONDS = 0.3
#: Maximum relative error of a correct kernel.
WRONG = 1e-2
#: Bytes to write for evicting everything else from the device's cache.
FLUSH = 1 << 28


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the median milliseconds of a call; of a single call if interpreted, where times mean nothing."""
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - began)
    for _ in range(3):
        run()
    other = torch.empty(FLUSH, dtype=torch.uint8, device=device)
    times: list[float] = []
    until = time.monotonic() + SECONDS
    while time.monotonic() < until or len(times) < 5:
        torch.cuda.synchronize()
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        other.zero_()
        first.record()
        run()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last))
    return sorted(times)[len(times) // 2]


def both(run: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Return the median milliseconds of a call, and of its launches replayed as a CUDA graph, as servers decode."""
    found = {"ms": timed(run, device)}
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        found["graph_ms"] = timed(graph.replay, device)
    return found


def pages_of(
    spec: str, batch: int, tokens: int, dim: int, kv_heads: int, device: torch.device, wide: float = 1.0
) -> CompressedKV:
    """Make pages in separate memory; one is encoded and copied."""
    codec = codecs.get(spec)
    size = min(PAGE, tokens)
    k, v = torch.randn(2, 1, kv_heads, size, dim).unbind(0)
    k[..., 1] *= wide
    first = codec.encode(k, "key"), codec.encode(v)

    def copy(packed: Packed) -> Packed:
        fields = {n: t.to(device).expand(batch, *t.shape[1:]).contiguous() for n, t in packed.tensors.items()}
        return replace(packed, tensors=fields, shape=(batch, *packed.shape[1:]), dtype=torch.float16)

    return CompressedKV([(copy(first[0]), copy(first[1])) for _ in range(tokens // size)])


def cases(smoke: bool) -> list[dict[str, Any]]:
    """Return the cases to compare with the reference: every codec and shape, every mask rule, every way to read codes."""
    shapes = ((2, 8, 2, 1, 1000, 64), (1, 28, 4, 1, 2048, 128), (1, 4, 2, 64, 700, 80), (2, 4, 4, 3, 320, 256))
    if smoke:
        shapes = ((2, 8, 2, 1, 100, 64),)
    found: list[dict[str, Any]] = [
        {"spec": spec, "shape": shape, "rule": {}, "lookup": None}
        for spec in (*CHECKED, *CHECKED_BRIEFLY)
        for shape in (shapes if spec in CHECKED else {shapes[0], shapes[-1]})
    ]
    batch, heads, kv_heads, _, tokens, dim = shapes[0]
    several = (batch, heads, kv_heads, 3, tokens, dim)
    for rule in ({"start": tokens - 3}, {"start": tokens - 3, "window": tokens // 2}, {"softcap": 5.0}):
        found += [{"spec": spec, "shape": several, "rule": rule, "lookup": None} for spec in ("hqmq:4", "int:4", "scalar:3")]
    found += [{"spec": spec, "shape": several, "rule": {}, "lookup": None} for spec in PAIRS]
    found += [{"spec": spec, "shape": shapes[0], "rule": {}, "lookup": name} for spec in READ for name in ways(spec)]
    # The points of hqmq:5 do not fit in shared memory.
    found += [{"spec": "hqmq:5", "shape": shapes[0], "rule": {}, "lookup": name} for name in ways("hqmq:5") if name != "held"]
    return found


def ways(spec: str) -> tuple[str, ...]:
    """Return the ways to read a codec's keys."""
    return lookups(format_of(spec))


def format_of(spec: str) -> Readable:
    """Return the format of a codec's keys."""
    form = codecs.get(spec).side("key").kernel_format(DIM)
    assert readable(form)
    return form


def correctness(
    device: torch.device, spec: str, shape: Sequence[int], rule: dict[str, Any], lookup: str | None
) -> dict[str, Any]:
    """Return the relative errors of one case."""
    batch, heads, kv_heads, queries, tokens, dim = shape
    codec = codecs.get(spec)
    k, v = torch.randn(2, batch, kv_heads, tokens, dim).unbind(0)
    k[..., 3] += 40
    k[..., 1] *= 30
    keys, values = codec.encode(k, "key"), codec.encode(v)
    cut = tokens // 2 + 5  # a page that begins inside a group
    pages = CompressedKV([(keys.slice(a, b), values.slice(a, b)) for a, b in ((0, cut), (cut, tokens))])
    moved = CompressedKV([(keys.to(device), values.to(device)) for keys, values in pages.pages])
    q = torch.randn(batch, heads, queries, dim)
    wanted, wanted_lse = reference.attend(q, pages, AttendParams(dim**-0.5, **rule))
    out, lse = triton.attend(q.to(device), moved, AttendParams(dim**-0.5, **rule), lookup=lookup)
    again, _ = triton.attend(q.to(device), moved, AttendParams(dim**-0.5, **rule), lookup=lookup)
    decoded = [(a, b) for a, b in zip(moved.pages[1], pages.pages[1], strict=True) if triton.decode_refusal(a) is None]
    errors = [float((triton.decode(a).cpu() - b.decode()).norm() / b.decode().norm()) for a, b in decoded]
    return {
        "relative_error": float((out.cpu() - wanted).norm() / wanted.norm()),
        "decode_error": max(errors, default=0.0),
        "lse_error": float((lse.cpu() - wanted_lse).abs().max()),
        "same_again": torch.equal(out, again),
    }


def right(row: dict[str, Any]) -> bool:
    """Whether a case ended with errors within the limit; NaN counts as wrong."""
    good = "error" not in row and row["same_again"]
    return good and row["relative_error"] <= WRONG and row["lse_error"] <= 0.1 and row["decode_error"] <= 1e-4


def dense_speed(q: Tensor, tokens: int) -> dict[str, dict[str, float]]:
    """Time PyTorch's implementations over dense keys and values, in milliseconds, and free these."""
    batch, heads, queries, dim = q.shape
    k, v = torch.randn(2, batch, KV_HEADS, tokens, dim, device=q.device, dtype=q.dtype).unbind(0)
    folded = q.view(batch, KV_HEADS, heads // KV_HEADS * queries, dim)  # a group's query heads as tokens
    return {
        "sdpa, enable_gqa": both(lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True), q.device),
        "sdpa, queries of a group folded": both(lambda: scaled_dot_product_attention(folded, k, v), q.device),
    }


def speed(device: torch.device, batch: int, tokens: int, queries: int) -> dict[str, Any]:
    """Time dense attention and each codec, in milliseconds, with ratios."""
    q = torch.randn(batch, HEADS, queries, DIM, device=device, dtype=torch.float16)
    dense = dense_speed(q, tokens)
    row: dict[str, Any] = {"dense": dense}
    for name, (spec, wide) in KEYS.items():
        pages = pages_of(spec, batch, tokens, DIM, KV_HEADS, device, wide)
        found = both(lambda pages=pages: triton.attend(q, pages, AttendParams(DIM**-0.5)), device)  # type: ignore[misc]
        times = {f"times_dense_{way}": min(own[way] for own in dense.values()) / ms for way, ms in found.items()}
        row[name] = {**found, **times}
    return row


def lookup_speed(device: torch.device, batch: int, tokens: int, spec: str, lookup: str) -> dict[str, Any]:
    """Time one way to read codes for one new token, in milliseconds; for "dense" the fastest dense implementation."""
    q = torch.randn(batch, HEADS, 1, DIM, device=device, dtype=torch.float16)
    if spec == "dense":
        found = dense_speed(q, tokens)
        return {way: min(own[way] for own in found.values()) for way in next(iter(found.values()))}
    pages = pages_of(spec, batch, tokens, DIM, KV_HEADS, device)
    usual = usual_lookup(format_of(spec)) == lookup
    return {"default": usual, **both(partial(triton.attend, q, pages, AttendParams(DIM**-0.5), lookup=lookup), device)}


def reading(rows: Sequence[dict[str, Any]], batch: int, way: str) -> Table:
    """Time the ways to read codes at one batch size, for each codec the fastest first, and dense attention."""
    table = Table("codec", "lookup", "ms", "times dense", "", title=f"batch {batch}", title_justify="left")
    mine = [row for row in rows if row["batch"] == batch and way in row]
    dense = next((row[way] for row in mine if row["spec"] == "dense"), float("nan"))
    for spec in dict.fromkeys(row["spec"] for row in mine):
        for row in sorted((row for row in mine if row["spec"] == spec), key=lambda row: float(row[way])):
            cells = (f"{row[way]:.3f}", f"{dense / row[way]:.2f}x", "default" if row.get("default") else "")
            table.add_row(spec, row["lookup"], *cells)
    return table


def encoding(device: torch.device, spec: str, count: int) -> dict[str, Any]:
    """Time the search for `count` chunks, and return the share of nearest codewords, milliseconds, and the ratio."""
    book = joint(int(4 * float(spec.partition(":")[2])))
    index = build_index(book.products.float() * book.step, book.conjugations).to(device)
    x = torch.randn(count, 4, device=device)
    found, wanted = triton.nearest(x, index), brute_force(x, index.words)
    distance, least = ((x - index.words[code]).norm(dim=-1) for code in (found, wanted))
    ms = {"ms": timed(partial(triton.nearest, x, index), device), "all_ms": timed(partial(brute_force, x, index.words), device)}
    return {"right": float((distance <= least * (1 + 1e-5)).float().mean()), **ms, "times_all": ms["all_ms"] / ms["ms"]}


def memories(device: torch.device, tokens: int) -> dict[str, tuple[Any, list[Tensor], Any]]:
    """Return, by name, the function that runs on the device, its inputs, and its definition."""
    found: dict[str, tuple[Any, list[Tensor], Any]] = {}
    k = normalize(torch.randn(1, 2, tokens, 64), dim=-1)
    x = [torch.randn(1, 2, 2, tokens, 64), k, torch.randn(1, 2, tokens, 64), -0.05 * torch.rand(1, 2, tokens)]
    x += [0.8 * torch.rand(1, 2, tokens), torch.randn(1, 2, 64, 64)]
    for rule in ("outer", "delta"):
        found[f"Tensor Cache, {rule}"] = partial(scan, rule=rule), x, partial(loop, rule=rule)
        if fused.refusal(x[0].to(device), x[2], rule, "write_first") is None:
            fast = partial(fused.fused_scan, rule=rule)
            found[f"Tensor Cache, {rule}, flash-linear-attention"] = fast, x, partial(loop, rule=rule)
    memory = TensorMemory(TensorMemoryConfig(), 96)
    found["Tensor Memory"] = deepcopy(memory).to(device), [torch.randn(2, min(tokens, 128), 96)], memory.reference
    return found


def memory_case(device: torch.device, fast: Any, inputs: list[Tensor], definition: Any) -> dict[str, Any]:
    """Return the largest relative error of outputs and gradients, and milliseconds of both passes."""
    wanted = both_passes(definition, inputs)
    on_device = [t.to(device) for t in inputs]
    found = both_passes(fast, on_device)
    error = max(float((a.cpu() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))
    return {"relative_error": error, "ms": timed(partial(both_passes, fast, on_device), device)}


def both_passes(run: Any, inputs: list[Tensor]) -> list[Tensor]:
    """Return the output of `run` and the gradients of its inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = run(*leaves)[0]
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
    return [out.detach(), *(g for g in torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True) if g is not None)]


def main() -> int:
    """Run all checks and timings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("docs/results/gpu.json"))
    parser.add_argument("--minutes", type=float, default=8.0, help="minutes after which no case is started")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to check that the script runs")
    options = parser.parse_args()
    why = triton.missing()
    if why is not None:
        parser.error(f"the Triton kernels cannot run here: {why}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "interpreter"
    about = {"device": name, "triton": version("triton"), "environment": environment()}
    record: dict[str, Any] = {**about, "correctness": [], "encoding": [], "lookups": [], "speed": [], "memories": []}
    until = time.monotonic() + 60 * options.minutes
    console = Console()

    def attempt(part: str, case: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Add a row, which for a failed case contains the error."""
        try:
            if time.monotonic() > until:
                raise TimeoutError(f"left out: {options.minutes:g} minutes were over")
            row = {**case, **run()}
        except Exception as error:
            row = {**case, "error": f"{type(error).__name__}: {error}"[:1000]}
            console.print(f"{part}: {case} failed: {row['error'][:200]}", markup=False)
        record[part].append(row)
        write_json(options.json, record)
        return row

    torch.manual_seed(0)
    wrong = []
    for case in cases(options.smoke):
        row = attempt("correctness", case, lambda case=case: correctness(device, **case))  # type: ignore[misc]
        wrong += [] if right(row) else [row]
    for row in wrong:
        console.print(f"wrong: {row}", markup=False)
    console.print(f"{name}: {len(record['correctness']) - len(wrong)} of {len(record['correctness'])} cases are right")
    if any(row["lookup"] is None for row in wrong):
        console.print("The kernels are wrong; their speed does not matter.")
        return 1
    bad = {(row["spec"], row["lookup"]) for row in wrong}
    good = [(spec, way) for spec in READ for way in ways(spec) if (spec, way) not in bad]
    for batch in (1,) if options.smoke else (1, 8):
        for spec, lookup in [("dense", ""), *good]:
            case = {"batch": batch, "tokens": 64 if options.smoke else 32768, "spec": spec, "lookup": lookup}
            attempt("lookups", case, lambda case=case: lookup_speed(device, **case))  # type: ignore[misc]
        console.print(reading(record["lookups"], batch, "graph_ms" if device.type == "cuda" else "ms"))
    for spec in BOOKS:
        case = {"spec": spec, "count": 200 if options.smoke else 1 << 20}
        row = attempt("encoding", case, lambda case=case: encoding(device, **case))  # type: ignore[misc]
        if "error" not in row:
            console.print(f"{spec}: {row['right']:.2%} of the codewords are nearest, {row['times_all']:.0f}x all of them")
    table = Table("batch", "tokens", "new", "dense ms", *KEYS)
    sizes = [(b, t, n) for n in (1, 64) for t in LENGTHS for b in BATCHES] + [(b, 32768, n) for n in (4, 16) for b in (1, 8)]
    for batch, tokens, queries in [(1, 64, 1)] if options.smoke else sizes:
        case = {"batch": batch, "tokens": tokens, "queries": queries}
        if device.type == "cuda" and 12 * batch * KV_HEADS * tokens * DIM > torch.cuda.mem_get_info()[0]:
            record["speed"].append({**case, "error": "the device has too little memory for the dense keys and values"})
            continue
        row = attempt("speed", case, lambda case=case: speed(device, **case))  # type: ignore[misc]
        if "error" in row:
            continue
        way = "graph_ms" if device.type == "cuda" else "ms"
        cells = [f"{row[key][way]:.3f} ({row[key][f'times_dense_{way}']:.2f}x)" for key in KEYS]
        dense = min(found[way] for found in row["dense"].values())
        table.add_row(str(batch), f"{tokens:,}", str(queries), f"{dense:.3f}", *cells)
    console.print(table)
    for name, (fast, inputs, definition) in memories(device, 64 if options.smoke else 1024).items():
        case = {"name": name}
        row = attempt("memories", case, partial(memory_case, device, fast, inputs, definition))
        if "error" not in row:
            console.print(f"{name}: relative error {row['relative_error']:.1e}, {row['ms']:.1f} ms forward and backward")
    console.print(f"Saved {options.json}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
