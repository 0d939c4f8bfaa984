"""Measure generation of a pretrained model, by kind of cache: first token, steps and memory. `generation.py --model` runs it.

For each prompt length all caches are filled, in one call or in chunks, and then decode, alternating every few steps, so that
a disturbance of the machine affects all of them. Memory is measured in a separate process for each. "processor" is the time
that all threads of the process spent computing; on a shared machine it is the more reliable figure.

Two generations side by side: two processes at once, each with half of the threads or each with all of them, against the same
two one after the other with all threads.
"""

from __future__ import annotations

import gc
import importlib.util
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, QuantizedCache

import tessera
from generation import PEERS, forget_peak, peak_memory

CACHES = (*PEERS, "dense", "sink:4 + hqmq:4 + recent:128")
#: Prompt lengths, in tokens.
LENGTHS = (256, 1024, 2048, 4096, 8192)
#: Steps of one cache before the next cache runs; a block of 64 tokens is encoded in at most one of eight such bursts.
BURST = 8
LLAMA_CPP = "llama.cpp, q4_0 cache, flash attention"


@dataclass(frozen=True)
class Run:
    """A cache and a prompt to measure."""

    cache: str
    tokens: int
    chunk: int


def load(path: str, cache: str) -> PreTrainedModel:
    """Load the model in float32, with Tessera's attention for Tessera's caches."""
    folder, options = (str(Path(path).parent), {"gguf_file": Path(path).name}) if path.endswith(".gguf") else (path, {})
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    return model if cache in PEERS else tessera.enable(model)


def empty(cache: str, model: PreTrainedModel) -> Any:
    """Make an empty cache."""
    if cache == "DynamicCache":
        return DynamicCache(config=model.config)
    if cache in PEERS:
        backend, axis = ("quanto", 0) if "quanto" in cache else ("hqq", 1)
        return QuantizedCache(backend, model.config, nbits=4, axis_key=axis, axis_value=axis)
    return tessera.Cache(cache, model)


def prompt(model: PreTrainedModel, tokens: int) -> torch.Tensor:
    """Draw random tokens; which they are does not affect the time."""
    size = model.config.get_text_config().vocab_size
    return torch.randint(size, (1, tokens), generator=torch.Generator().manual_seed(0))


def fill(model: PreTrainedModel, cache: Any, run: Run) -> None:
    """Read the prompt."""
    ids = prompt(model, run.tokens)
    for start in range(0, run.tokens, run.chunk):
        model(ids[:, start : start + run.chunk], past_key_values=cache, logits_to_keep=1)


def step(model: PreTrainedModel, cache: Any) -> None:
    """Decode a token."""
    model(torch.tensor([[1]]), past_key_values=cache, logits_to_keep=1)


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Return the wall-clock and processor seconds of a call."""
    began = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - began[0], time.process_time() - began[1]


@torch.inference_mode()
def times(models: dict[bool, PreTrainedModel], runs: Sequence[Run], steps: int, repeats: int) -> list[dict[str, Any]]:
    """Time prefill and alternating steps of all caches at one prompt length. models: with Tessera's attention, and without."""
    filled: dict[Run, list[tuple[float, float]]] = {run: [] for run in runs}
    decoded: dict[Run, list[tuple[float, float]]] = {run: [] for run in runs}
    caches: dict[Run, Any] = {}
    for _ in range(repeats):
        for run in runs:
            caches.pop(run, None)
            model = models[run.cache not in PEERS]
            caches[run] = cache = empty(run.cache, model)
            filled[run].append(timed(lambda model=model, cache=cache, run=run: fill(model, cache, run)))
    for burst in range(-(-steps // BURST) + 1):
        for run in runs:
            model, cache = models[run.cache not in PEERS], caches[run]
            took = [timed(lambda model=model, cache=cache: step(model, cache)) for _ in range(BURST)]
            decoded[run] += took if burst else []  # the first one builds lazily made tables
    rows = []
    for run in runs:
        (fill_s, fill_cpu), (step_s, step_cpu) = ([*zip(*found[run], strict=True)] for found in (filled, decoded))
        rows.append(
            {
                "cache": run.cache,
                "tokens": run.tokens,
                "chunk": run.chunk,
                "prefill_s": median(fill_s),
                "prefill_processor_s": median(fill_cpu),
                "step_ms": 1e3 * median(step_s),
                "step_processor_ms": 1e3 * median(step_cpu),
                "slowest_step_ms": 1e3 * max(step_s),
                "slowest_step_processor_ms": 1e3 * max(step_cpu),
            }
        )
    return rows


@torch.inference_mode()
def memory(path: str, run: Run, channel: Connection) -> None:
    """Return the peak bytes that prefill and a few steps add to a process in which the model has already run."""
    model = load(path, run.cache)
    fill(model, empty(run.cache, model), Run(run.cache, 256, 256))
    gc.collect()
    before = forget_peak()
    cache = empty(run.cache, model)
    fill(model, cache, run)
    for _ in range(BURST):
        step(model, cache)
    channel.send(peak_memory() - before)


@torch.inference_mode()
def generate(path: str, run: Run, steps: int, threads: int, channel: Connection) -> None:
    """Load the model, report it, wait for a signal, then generate and send the seconds it took."""
    torch.set_num_threads(threads)
    model = load(path, run.cache)
    fill(model, empty(run.cache, model), Run(run.cache, 64, 64))
    channel.send("ready")
    channel.recv()
    cache = empty(run.cache, model)
    began = time.perf_counter()
    fill(model, cache, run)
    for _ in range(steps):
        step(model, cache)
    channel.send(time.perf_counter() - began)


def start(work: Callable[..., None], *given: Any) -> tuple[Any, Connection]:
    """Start a worker process, and return it with its connection."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=work, args=(*given, there))
    process.start()
    there.close()
    return process, here


def answer(process: Any, talk: Connection) -> Any:
    """Return the next message of a process.

    Raises:
        SystemExit: if it has ended instead.
    """
    try:
        return talk.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"a process ended with {process.exitcode} and no result") from None


def peak(path: str, run: Run) -> int:
    """Run `memory` in a separate process."""
    process, talk = start(memory, path, run)
    found: int = answer(process, talk)
    process.join()
    return found


def together(path: str, run: Run, steps: int, count: int, threads: int) -> float:
    """Return the seconds that simultaneous generations take, each with this many threads."""
    working = [start(generate, path, run, steps, threads) for _ in range(count)]
    for each in working:
        answer(*each)
    began = time.perf_counter()
    for _, talk in working:
        talk.send("go")
    for each in working:
        answer(*each)
    took = time.perf_counter() - began
    for process, _ in working:
        process.join()
    return took


def side_by_side(path: str, run: Run, steps: int, threads: int) -> dict[str, Any]:
    """Time two generations, in sequence with all threads, and simultaneously with half or all of the threads each."""
    return {
        "cache": run.cache,
        "tokens": run.tokens,
        "steps": steps,
        "threads": threads,
        "one_after_the_other_s": sum(together(path, run, steps, 1, threads) for _ in range(2)),
        "at_once_half_s": together(path, run, steps, 2, max(1, threads // 2)),
        "at_once_all_s": together(path, run, steps, 2, threads),
    }


def llama_cpp(file: Path, runs: Sequence[Run], steps: int) -> list[dict[str, Any]]:
    """Measure the same for llama.cpp, with the weights of the file and llama.cpp's own matrix products."""
    from llama_cpp import Llama

    rows = []
    for run in runs:
        made = Llama(
            str(file),
            n_ctx=run.tokens + steps + 2 * BURST,
            n_batch=run.chunk,
            n_threads=torch.get_num_threads(),
            n_threads_batch=torch.get_num_threads(),
            type_k=2,
            type_v=2,
            flash_attn=True,
            verbose=False,
        )
        made.eval([1, 2, 3])
        made.reset()
        fill_s, fill_cpu = timed(lambda made=made, run=run: made.eval([1] * run.tokens))
        took = [timed(lambda made=made: made.eval([1])) for _ in range(steps)]
        rows.append(
            {
                "cache": LLAMA_CPP,
                "tokens": run.tokens,
                "chunk": run.chunk,
                "prefill_s": fill_s,
                "prefill_processor_s": fill_cpu,
                "step_ms": 1e3 * median(s for s, _ in took),
                "step_processor_ms": 1e3 * median(s for _, s in took),
                "slowest_step_ms": 1e3 * max(s for s, _ in took),
                "slowest_step_processor_ms": 1e3 * max(s for _, s in took),
            }
        )
    return rows


def missing(cache: str) -> str | None:
    """Return the name of the missing package that a baseline needs, if any."""
    package = PEERS.get(cache)
    return package if package is not None and importlib.util.find_spec(package) is None else None


def measure(
    path: str,
    lengths: Sequence[int],
    caches: Sequence[str],
    chunk: int,
    steps: int,
    repeats: int,
    gguf: Path | None,
    save: Callable[[dict[str, Any]], None],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Run all parts. save: called with the results after each part; say: called with progress and what is skipped."""
    left_out = [f"{cache}: {package} is not installed" for cache in caches if (package := missing(cache))]
    caches = [cache for cache in caches if not missing(cache)]
    if gguf is None or importlib.util.find_spec("llama_cpp") is None:
        why = "no --gguf was given" if gguf is None else "llama-cpp-python is not installed"
        left_out.append(f"llama.cpp: {why}")
        gguf = None
    for line in left_out:
        say(f"left out: {line}")
    models = {False: load(path, "DynamicCache"), True: load(path, "dense")}
    made: dict[str, Any] = {"model": Path(path).name, "left_out": left_out, "rows": [], "side_by_side": []}
    for tokens in lengths:
        for size in dict.fromkeys((tokens, min(chunk, tokens))):
            runs = [Run(cache, tokens, size) for cache in caches]
            say(f"{tokens} tokens, {size} a call")
            for row, run in zip(times(models, runs, steps, repeats), runs, strict=True):
                made["rows"].append({**row, "peak_growth": peak(path, run)})
            made["rows"] += [] if gguf is None else llama_cpp(gguf, runs[:1], steps)
            save(made)
    threads = os.cpu_count() or 1
    for cache in ("DynamicCache", caches[-1]):
        say(f"two generations side by side, {cache}")
        made["side_by_side"].append(side_by_side(path, Run(cache, 512, 512), 64, threads))
        save(made)
    return made
