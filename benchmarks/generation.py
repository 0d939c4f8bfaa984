"""Measure decoding of a whole model, in tokens per second and memory, with each kind of cache at growing contexts.

The model has layers of an 8-billion-parameter Llama with random weights, as many as fit in memory. Its cache is filled with
random keys and values, in chunks and without running the model, and then tokens are decoded one by one. Each cache runs in a
separate process. The baselines are transformers' `DynamicCache`, which is exact, and its `QuantizedCache` with 4 bits, which
decodes everything at every step (needs optimum-quanto and hqq: pip install 'tessera[bench]').

"attention" is the time of a step minus that of a step with an empty cache, which is the cost of the context.

With `--model` a pretrained model generates instead: see model_generation.py.

Example:

    python benchmarks/generation.py
    python benchmarks/generation.py --model SmolLM2-135M-Instruct
    python benchmarks/generation.py --model SmolLM2-135M-Instruct --restrict avx2 --json out.json
    python benchmarks/generation.py --tokens 4096 --caches DynamicCache "sink:4 + hqmq:4 + recent:128" --layers 2
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tessera
from instruction_sets import VARIABLES, environment_within, restrict
from tessera.cache import BLOCK
from tessera.codecs.hqmq_joint import JointHQMQ
from tessera.evaluation.table import size
from tessera.files import atomic_path
from tessera.kernels import dispatch

ROOT = Path(__file__).resolve().parent.parent
PEERS = {"DynamicCache": None, "QuantizedCache, quanto": "optimum", "QuantizedCache, hqq": "hqq"}
CACHES = (*PEERS, "sink:4 + hqmq:4 + recent:128", "sink:4 + hqmq:3 + recent:128")
#: Hidden size of an 8B model, whose MLP is 3.5 times as wide.
WIDTH = 4096
#: Tokens per call while a cache is filled.
CHUNK = 2048


def build(layers: int, width: int = WIDTH) -> LlamaForCausalLM:
    """Make a Llama with the attention of an 8B model, random weights, in bfloat16."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=7 * width // 2,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=1 << 20,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def make(name: str, model: LlamaForCausalLM) -> Any:
    """Make an empty cache."""
    if name == "DynamicCache":
        return DynamicCache(config=model.config)
    if name in PEERS:
        backend, axis = ("quanto", 0) if "quanto" in name else ("hqq", 1)
        return QuantizedCache(backend, model.config, nbits=4, axis_key=axis, axis_value=axis)
    return tessera.Cache(name, model)


def peak_memory() -> int:
    """Return the peak resident memory of this process since `forget_peak`, in bytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["VmHWM"].split()[0]) * 1024


def forget_peak() -> int:
    """Reset the peak of resident memory, and return the present value in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


@torch.inference_mode()
def steps(model: LlamaForCausalLM, cache: Any, count: int) -> float:
    """Return the median seconds of a decoding step."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        model(torch.tensor([[1]]), past_key_values=cache)
        times.append(time.perf_counter() - began)
    return median(times[1:])


@torch.inference_mode()
def breakdown(model: LlamaForCausalLM, cache: Any) -> dict[str, float]:
    """Return milliseconds per step and layer by part, over the steps between two compressions of a block.

    "kernel": attention to all tiers in one call, or to the compressed one if several calls are made. "compress": encoding.
    "update": appending new keys and values. "attention": the rest of the attention function.
    """
    spent = dict.fromkeys(("kernel", "compress", "update", "attention"), 0.0)
    inner = [0.0]  # for each open call, the time of its nested calls

    def timed(name: str, call: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            inner.append(0.0)
            try:
                return call(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - began
                spent[name] += elapsed - inner.pop()
                inner[-1] += elapsed

        return run

    layers, kind = model.config.num_hidden_layers, ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation]
    with (
        patch.object(dispatch, "attend", timed("kernel", dispatch.attend)),
        patch.object(dispatch, "attend_sources", timed("kernel", dispatch.attend_sources)),
        patch.object(JointHQMQ, "encode", timed("compress", JointHQMQ.encode)),
        patch.object(type(cache), "update", timed("update", type(cache).update)),
        patch.dict(ALL_ATTENTION_FUNCTIONS._global_mapping, {model.config._attn_implementation: timed("attention", kind)}),
    ):
        for _ in range(BLOCK):
            model(torch.tensor([[1]]), past_key_values=cache)
    return {name: 1e3 * seconds / BLOCK / layers for name, seconds in spent.items()}


@torch.inference_mode()
def measure(name: str, tokens: int, layers: int, count: int, width: int, channel: Connection) -> None:
    """Measure one cache in this process and send a row, or the text of an error."""
    try:
        torch.manual_seed(0)
        model = build(layers, width)
        empty = steps(model, make(name, model), count)
        before = forget_peak()
        cache = make(name, model)
        for start in range(0, tokens, CHUNK):
            shape = (1, 8, min(CHUNK, tokens - start), 128)
            for layer in range(layers):
                cache.update(torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16(), layer)
        seconds = steps(model, cache, count)
        row = {
            "cache": name,
            "tokens": tokens,
            "step_ms": 1e3 * seconds,
            "attention_ms": 1e3 * (seconds - empty),
            "tokens_per_second": 1 / seconds,
            "peak_growth": peak_memory() - before,
        }
        if isinstance(cache, tessera.Cache) and width == WIDTH:
            row["breakdown"] = breakdown(model, cache)
        channel.send(row)
    except BaseException:
        channel.send(traceback.format_exc())
        raise


def run(name: str, tokens: int, layers: int, count: int, width: int = WIDTH) -> dict[str, Any]:
    """Run `measure` in a separate process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(name, tokens, layers, count, width, there))
    process.start()
    there.close()
    try:
        row = here.recv()
    except EOFError:
        row = f"the process ended with {process.exitcode} and no result"
    process.join()
    if isinstance(row, str):
        raise SystemExit(f"{name} at {tokens} tokens failed:\n{row}")
    return row  # type: ignore[no-any-return]


def pretrained(options: argparse.Namespace, console: Console) -> int:
    """Measure a pretrained model, see model_generation.py.

    Rows of other lengths are kept in the record if they have the same settings and day.
    """
    import model_generation

    path = options.json or ROOT / "docs" / "results" / "model_generation.json"
    settings = {"steps": options.steps or 136, "repeats": options.repeats, "environment": environment_within(options.restrict)}
    lengths = options.tokens or model_generation.LENGTHS
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    same = all(before.get(name) == settings[name] for name in settings) and before["model"] == Path(options.model).name
    kept = [row for row in before["rows"] if row["tokens"] not in lengths] if same else []

    def save(made: dict[str, Any]) -> None:
        rows = sorted([*kept, *made["rows"]], key=lambda row: (row["tokens"], -row["chunk"]))
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps({**settings, **made, "rows": rows}, indent=1) + "\n", encoding="utf-8")

    made = model_generation.measure(
        options.model,
        lengths,
        options.caches or model_generation.CACHES,
        chunk=options.chunk,
        steps=settings["steps"],
        repeats=options.repeats,
        gguf=options.gguf,
        save=save,
        say=lambda line: console.print(line, highlight=False),
    )
    table = Table("cache", "tokens", "a call", "prefill, s", "ms a step", "slowest", "peak memory")
    for row in made["rows"]:
        cells = (f"{row['prefill_s']:.2f}", f"{row['step_ms']:.1f}", f"{row['slowest_step_ms']:.1f}")
        held = size(row["peak_growth"]) if "peak_growth" in row else ""
        table.add_row(row["cache"], f"{row['tokens']:,}", f"{row['chunk']:,}", *cells, held)
    console.print(table)
    console.print(f"Saved {path}", highlight=False)
    return 0


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--caches", nargs="+")
    parser.add_argument("--layers", type=int, default=4, help="number of layers of the model; an 8B model has 32")
    parser.add_argument("--steps", type=int, help="tokens decoded, of which the first does not count")
    parser.add_argument("--json", type=Path, help="file for the record  [default: in docs/results]")
    parser.add_argument("--model", help="a pretrained model: a folder, a GGUF file or a name on the Hub")
    parser.add_argument("--chunk", type=int, default=512, help="with --model: prompts are read in one call and in such chunks")
    parser.add_argument("--repeats", type=int, default=3, help="with --model: number of prefills that are timed")
    parser.add_argument(
        "--gguf", type=Path, help="with --model: the same model for llama.cpp, if llama-cpp-python is installed"
    )
    parser.add_argument("--restrict", choices=VARIABLES, help="instruction set that Tessera and PyTorch may not exceed")
    options = parser.parse_args()
    if options.restrict and options.gguf:
        parser.error("llama.cpp chooses its instructions when it is built; leave --gguf out or build it for the set")
    restrict(options.restrict)
    console = Console()
    if options.model is not None:
        return pretrained(options, console)
    options.tokens = options.tokens or (4096, 16384, 32768)
    options.caches, options.steps = options.caches or CACHES, options.steps or 8
    options.json = options.json or ROOT / "docs" / "results" / "generation.json"
    rows: list[dict[str, Any]] = []

    def save() -> None:
        record = {
            "layers": options.layers,
            "steps": options.steps,
            "environment": environment_within(options.restrict),
            "rows": rows,
        }
        with atomic_path(options.json) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=len(options.tokens) * len(options.caches))
        for tokens in options.tokens:
            for name in options.caches:
                package = PEERS.get(name)
                if package is not None and importlib.util.find_spec(package) is None:
                    console.print(f"{name} is left out: {package} is not installed", highlight=False)
                else:
                    rows.append(run(name, tokens, options.layers, options.steps))
                    save()  # written after each row, so that an interrupted run keeps its results
                progress.advance(task)
    table = Table("cache", "tokens", "ms a token", "of them for the context", "peak memory of the cache")
    for row in rows:
        cells = (f"{row['step_ms']:.1f}", f"{row['attention_ms']:.1f}", size(row["peak_growth"]))
        table.add_row(row["cache"], f"{row['tokens']:,}", *cells)
    console.print(table)
    console.print(f"Saved {options.json}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
