"""Compare the growth of a process's resident memory by a cache with the bytes that the cache reports.

Each cache is filled in a separate process. Random keys and values are added by `cache.update`, layer by layer and in chunks, as
a model does; attention to all earlier tokens is left out, because it takes hours on a CPU and leaves no memory allocated. At
the end the model generates one real token from the full cache.

Growth is the resident memory after that minus the resident memory before the cache was made, both after the allocator has
returned free memory to the system. By default it keeps part of it: "with reserve" is the growth before that. The peak is taken
while the cache is filled. Beforehand a short cache of the same kind is used and discarded, so that the code, the codec's
codebook and its index are already loaded; they do not depend on the length and are listed as "once".

Example:

    python benchmarks/resident_memory.py --tokens 8192 --specs "sink:4 + hqmq:4 + recent:128" q4_0 --json memory.json
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import tessera
from tessera.cache import parse
from tessera.evaluation.records import environment
from tessera.evaluation.table import size
from tessera.files import atomic_path

RESULT = Path(__file__).resolve().parent.parent / "docs" / "results" / "resident_memory.json"
EXACT = "DynamicCache"
SPECS = (
    "dense",
    "sink:4 + hqmq:4 + recent:128",
    "sink:4 + hqmq:3 + recent:128",
    "hqmq:3",
    "q4_0",
    "q8_0",
    "sink:4 + window:1024",
)
#: Tokens per call while the cache is filled, and length of the short cache that is used beforehand.
CHUNK, WARM_UP = 512, 1536


@dataclass(frozen=True)
class Shape:
    """The properties of a model that a cache depends on.

    Attributes:
        layers: number of layers.
        heads: query heads of a layer.
        kv_heads: key heads of a layer.
        head_dim: numbers in a key.
        dtype: of keys, values and weights.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str

    def model(self) -> LlamaForCausalLM:
        """Make a Llama with random weights that take little memory compared with its cache."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=1 << 20,
        )
        return LlamaForCausalLM(config).to(getattr(torch, self.dtype)).eval()

    def dense_bytes(self, tokens: int) -> int:
        """Return the bytes of all keys and values."""
        return 2 * self.layers * self.kv_heads * self.head_dim * getattr(torch, self.dtype).itemsize * tokens


@dataclass(frozen=True)
class Row:
    """The result of one cache.

    Attributes:
        spec: its specification, or "DynamicCache".
        rss_growth: bytes by which the process has grown at the end.
        rss_with_reserve: the same before the allocator has returned free memory.
        rss_peak: largest growth in bytes.
        rss_once: bytes that the model and the use of a short cache took before.
        report_bytes: bytes that the cache reports; for "DynamicCache" the bytes of its tensors.
        dense_bytes: bytes of all keys and values if none were packed or dropped.
        ratio_to_exact: growth with "DynamicCache" over the growth with this.
        seconds: time to fill the cache.
    """

    spec: str
    rss_growth: int
    rss_with_reserve: int
    rss_peak: int
    rss_once: int
    report_bytes: int
    dense_bytes: int
    ratio_to_exact: float
    seconds: float


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines() if ":" in line)
        return int(fields["VmRSS"].split()[0]) * 1024
    try:
        import psutil
    except ImportError:
        raise SystemExit("resident memory cannot be read on this system without psutil: pip install psutil") from None
    return int(psutil.Process().memory_info().rss)


def give_back() -> None:
    """Return free memory of Python and the allocator to the system, so that growth is not hidden in it."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
        if trim is not None:
            trim(0)


def make(spec: str, model: LlamaForCausalLM) -> Any:
    """Make an empty cache."""
    return DynamicCache(config=model.config) if spec == EXACT else tessera.Cache(spec, model)


def held(cache: Any) -> int:
    """Return the bytes that a cache reports."""
    if isinstance(cache, tessera.Cache):
        return cache.report().nbytes
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


@torch.inference_mode()
def fill(cache: Any, model: LlamaForCausalLM, shape: Shape, tokens: int, progress: Any = None) -> int:
    """Fill a cache, the last token by generating from it. Return the largest resident memory seen."""
    random = torch.Generator().manual_seed(1)
    peak = 0
    for start in range(0, tokens - 1, CHUNK):
        count = min(CHUNK, tokens - 1 - start)
        size_ = (1, shape.kv_heads, count, shape.head_dim)
        for layer in range(shape.layers):
            k, v = (torch.randn(size_, generator=random).to(getattr(torch, shape.dtype)) for _ in range(2))
            cache.update(k, v, layer)
            peak = max(peak, resident())
        if progress is not None:
            progress(start + count)
    logits = model(torch.tensor([[1]]), past_key_values=cache).logits
    assert torch.isfinite(logits).all()
    assert cache.get_seq_length() == tokens
    return max(peak, resident())


def measure(spec: str, shape: Shape, tokens: int, channel: Connection) -> None:
    """Measure one cache in this process; send its progress in tokens, and at the end a `Row` without its ratio, or an error."""
    try:
        start = resident()
        model = shape.model()
        fill(make(spec, model), model, shape, min(tokens, WARM_UP))
        give_back()
        before = resident()
        began = time.perf_counter()
        cache = make(spec, model)
        peak = fill(cache, model, shape, tokens, channel.send)
        seconds = time.perf_counter() - began
        gc.collect()
        reserved = resident()
        give_back()
        growth = resident() - before
        once, most = before - start, max(peak, reserved) - before
        channel.send(Row(spec, growth, reserved - before, most, once, held(cache), shape.dense_bytes(tokens), 0, seconds))
    except BaseException:
        channel.send(traceback.format_exc())
        raise


def measure_apart(spec: str, shape: Shape, tokens: int, progress: Any) -> Row:
    """Run `measure` in a new process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(spec, shape, tokens, theirs))
    process.start()
    theirs.close()
    try:
        while True:
            message = ours.recv()
            if isinstance(message, Row):
                return message
            if isinstance(message, str):
                raise SystemExit(f"{spec}: {message}")
            progress(message)
    except EOFError:
        process.join()
        raise SystemExit(f"{spec}: the process ended early with code {process.exitcode}; was there enough memory?") from None
    finally:
        process.join()


def show(rows: list[Row], tokens: int, shape: Shape, console: Console) -> None:
    """Print the table and its conclusion."""
    title = f"{tokens:,} tokens, {shape.layers} layers, {shape.kv_heads} key heads of {shape.head_dim}, {shape.dtype}"
    table = Table(title=title)
    for column in (
        "cache",
        "growth",
        "report",
        "growth / report",
        "smaller",
        "with reserve",
        "smaller",
        "peak",
        "once",
        "seconds",
    ):
        table.add_column(column, justify="left" if column == "cache" else "right", no_wrap=True)
    exact = rows[0]
    for row in rows:
        table.add_row(
            row.spec,
            size(row.rss_growth),
            size(row.report_bytes),
            f"{row.rss_growth / row.report_bytes:.2f}",
            f"{row.ratio_to_exact:.2f}x",
            size(row.rss_with_reserve),
            f"{exact.rss_with_reserve / max(1, row.rss_with_reserve):.2f}x",
            size(row.rss_peak),
            size(row.rss_once),
            f"{row.seconds:.1f}",
        )
    console.print(table)
    console.print(sentence(rows, tokens), soft_wrap=True, highlight=False, markup=False)


def sentence(rows: list[Row], tokens: int) -> str:
    """Return the conclusion in words: the recommended cache, or else the first that packs, against the exact one."""
    exact = rows[0]
    packed = [row for row in rows[1:] if parse(row.spec).codec is not None]
    chosen = next((row for row in packed if parse(row.spec) == parse(SPECS[1])), packed[0] if packed else rows[-1])
    reserve = exact.rss_with_reserve / max(1, chosen.rss_with_reserve)
    return (
        f"Holding {tokens:,} tokens, the process grows by {size(chosen.rss_growth)} with {chosen.spec!r} and by "
        f"{size(exact.rss_growth)} with transformers' {EXACT}: {chosen.ratio_to_exact:.2f}x less, or {reserve:.2f}x less "
        f"with what the allocator keeps in reserve. The cache reports {size(chosen.report_bytes)}."
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of each cache (32768)")
    parser.add_argument("--specs", nargs="+", default=SPECS, help=f"caches besides {EXACT} ({len(SPECS)} of them)")
    parser.add_argument("--layers", type=int, default=8, help="layers of the model (8)")
    parser.add_argument("--kv-heads", type=int, default=4, help="key heads of a layer; there are four queries for each (4)")
    parser.add_argument("--head-dim", type=int, default=128, help="numbers in a key (128)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="dtype of the cache (bfloat16)"
    )
    parser.add_argument("--json", type=Path, default=RESULT, help="file for the result (docs/results/resident_memory.json)")
    options = parser.parse_args()
    try:
        specs = [str(parse(spec)) for spec in options.specs]
    except ValueError as error:
        parser.error(str(error))
    if min(options.tokens, options.layers, options.kv_heads, options.head_dim) < 1:
        parser.error("--tokens, --layers, --kv-heads and --head-dim must be at least 1")
    shape = Shape(options.layers, 4 * options.kv_heads, options.kv_heads, options.head_dim, options.dtype)

    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        for spec in (EXACT, *specs):
            task = bar.add_task(spec, total=options.tokens)
            row = measure_apart(spec, shape, options.tokens, lambda done, task=task: bar.update(task, completed=done))
            bar.update(task, completed=options.tokens)
            exact = rows[0].rss_growth if rows else row.rss_growth
            rows.append(Row(**{**asdict(row), "ratio_to_exact": exact / max(1, row.rss_growth)}))
    # A table cut to the width of a narrow terminal would lose figures; output to a file has no width to respect.
    show(rows, options.tokens, shape, Console() if sys.stdout.isatty() else Console(width=200))
    result = {
        "tokens": options.tokens,
        "model": asdict(shape),
        "versions": environment(),
        "sentence": sentence(rows, options.tokens),
        "rows": [asdict(row) for row in rows],
    }
    with atomic_path(options.json) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
