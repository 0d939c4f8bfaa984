"""List what is measured, and run a measurement by its name.

Every script and every JSON file in docs/results is registered here once: what it measures, where it writes, how long it takes
on two cores, and what it needs beyond `make install`. Arguments after the name are passed to the command.

Example:

    python benchmarks/run.py                               # the list
    python benchmarks/run.py decode-attention --repeats 3
    python benchmarks/run.py --all                         # as `make bench`: all that need nothing further
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Codecs that are measured on four times as much text.
LONG = ("hqmq:3", "hqmq:4", "hqmq:s24_r2", "hqmq:s96_r4", "scalar:3", "scalar:4", "q4_0")
LENGTHS = ("1024", "2048", "4096", "8192")
RULER_LENGTHS = ("1024", "2048", "8192")
CACHES = ("DynamicCache", "QuantizedCache, quanto", "sink:4 + hqmq:4 + recent:128")
TASKS = ("single_2", "multikey_1", "vt", "cwe", "fwe")
WINDOWS = ("window:256", "sink:4 + window:256", "sink:4 + window:256 + tc")


@dataclass(frozen=True)
class Benchmark:
    """A measurement, or something made from measurements.

    Attributes:
        name: on the command line.
        measures: what it measures, in one line.
        command: a script of this folder and its arguments, or "tessera" and its arguments.
        results: files in docs/results that it writes.
        takes: approximate time on two cores.
        needs: what it needs beyond `make install`; if anything, `--all` skips it.
        measured: the date of results whose files do not contain it.
        shown: documents, in docs/, that show the results.
    """

    name: str
    measures: str
    command: tuple[str, ...]
    results: tuple[str, ...] = ()
    takes: str = "minutes"
    needs: str = ""
    measured: str = ""
    shown: tuple[str, ...] = ()

    def line(self, more: Sequence[str] = ()) -> list[str]:
        """The command as a list of arguments for `subprocess`."""
        first, *rest = self.command
        start = ["-m", "tessera"] if first == "tessera" else [str(ROOT / first)]
        return [sys.executable, *start, *rest, *more]


def _compare(name: str, *options: str) -> tuple[str, ...]:
    return ("tessera", "compare", "--out", f"docs/results/{name}", *options)


BENCHMARKS = (
    Benchmark(
        "demo",
        "sixteen caches on the demo model: perplexity, KL, bits",
        _compare("demo"),
        ("demo/compare.json",),
        measured="2026-11-30",
        shown=("measurements.md",),
    ),
    Benchmark(
        "demo-long",
        "eight of them on four times as much text, as generation reads it",
        _compare(
            "demo_long",
            *("--windows", "16", "--protocol", "streaming", "--specs"),
            *(f"sink:4 + {codec} + recent:128" for codec in LONG),
        ),
        ("demo_long/compare.json",),
        measured="2026-11-30",
        shown=("measurements.md",),
    ),
    Benchmark(
        "demo-long-paper",
        "the same codecs with every key and value quantised before it is read",
        _compare("demo_long_paper", "--windows", "16", "--protocol", "paper", "--specs", *LONG),
        ("demo_long_paper/compare.json",),
        measured="2026-11-30",
        shown=("measurements.md",),
    ),
    Benchmark(
        "demo-memory",
        "a window of the demo model, with its Tensor Cache and without",
        _compare("demo_memory", "--protocol", "streaming", *(word for spec in WINDOWS for word in ("--specs", spec))),
        ("demo_memory/compare.json",),
        measured="2026-11-25",
        shown=("tensor_cache.md",),
    ),
    Benchmark(
        "demo-training",
        "the demo model trained from Python source, and its losses",
        ("tessera", "train", "demo"),
        ("demo_training.json",),
        "hours",
        "--out FOLDER, where summary.json has the figures",
        measured="2026-11-21",
        shown=("measurements.md",),
    ),
    Benchmark(
        "tiny1m",
        "caches on a Llama of a million parameters trained elsewhere on TinyStories",
        _compare("tiny1m"),
        ("tiny1m/compare.json",),
        needs="--model FOLDER --text STORIES",
        measured="2026-11-21",
        shown=("measurements.md",),
    ),
    Benchmark(
        "real-model",
        "the caches of the demo on SmolLM2-135M-Instruct: make demo-real",
        ("benchmarks/real_model.py",),
        needs="a download of 93 MB from PyPI",
    ),
    Benchmark(
        "real-models",
        "caches on SmolLM2-135M-Instruct, and on the same model with rescaled keys",
        ("benchmarks/real_models.py",),
        (
            "real_models/paper.json",
            "real_models/streaming_a.json",
            "real_models/streaming_b.json",
            "real_models/streaming_c.json",
        ),
        "hours",
        "--text wikitext-2-valid.txt; a download of 93 MB from PyPI",
        measured="2026-11-30",
        shown=("measurements.md",),
    ),
    Benchmark(
        "rescaled-keys",
        "make a model whose key channels have very different widths, with the same output as before",
        ("benchmarks/rescaled_keys.py",),
        needs="--model FOLDER --out FOLDER",
    ),
    Benchmark(
        "frontier",
        "loss and recall against the bytes of a cache, for every policy, on the demo model",
        ("benchmarks/frontier.py",),
        ("frontier.json",),
        "half an hour",
    ),
    Benchmark(
        "sparse-reading",
        "the speed and the loss of reading the best blocks only",
        ("benchmarks/sparse_reading.py",),
        ("sparse_reading.json",),
    ),
    Benchmark(
        "codec-error",
        "error and true bits of every codec on four kinds of vectors, and whether they meet their bars",
        ("benchmarks/codec_error.py",),
        ("codec_error.json",),
        measured="2026-11-21",
        shown=("measurements.md",),
    ),
    Benchmark(
        "resident-memory",
        "growth of a process by a cache, compared with the bytes that the cache reports",
        ("benchmarks/resident_memory.py",),
        ("resident_memory.json",),
        measured="2026-11-21",
        shown=("measurements.md",),
    ),
    Benchmark(
        "decode-attention",
        "attention of one new token over a long cache against the fastest dense implementation in PyTorch",
        ("benchmarks/decode_attention.py",),
        ("decode_attention.json",),
        shown=("kernels.md",),
    ),
    Benchmark(
        "decode-attention-avx2",
        "the same with Tessera's kernels restricted to AVX2",
        ("benchmarks/decode_attention.py", "--level", "avx2", "--json", "docs/results/decode_attention_avx2.json"),
        ("decode_attention_avx2.json",),
        shown=("kernels.md",),
    ),
    Benchmark(
        "llamacpp-attention",
        "the same against llama.cpp with f16, q8_0 and q4_0 caches",
        ("benchmarks/llamacpp_attention.py",),
        ("llamacpp_attention.json",),
        needs="pip install 'tessera[bench]', which builds llama.cpp",
        shown=("kernels.md",),
    ),
    Benchmark(
        "llamacpp-attention-avx2",
        "the same with Tessera and PyTorch restricted to AVX2, llama.cpp as it is built",
        (
            "benchmarks/llamacpp_attention.py",
            *("--restrict", "avx2", "--tokens", "32768", "--json", "docs/results/llamacpp_attention_avx2.json"),
        ),
        ("llamacpp_attention_avx2.json",),
        needs="pip install 'tessera[bench]', which builds llama.cpp",
    ),
    Benchmark(
        "generation",
        "tokens per second and peak memory of a whole model against transformers' own caches",
        ("benchmarks/generation.py", "--layers", "2"),
        ("generation.json",),
        needs="pip install 'tessera[bench]'",
        measured="2026-11-25",
        shown=("kernels.md",),
    ),
    Benchmark(
        "cache-attention",
        "a step's attention behind 32,768 tokens with transformers' own caches, less that of a step with an empty cache",
        (
            "benchmarks/llamacpp_attention.py",
            "--tokens",
            "32768",
            "--caches",
            *CACHES,
            "--json",
            "docs/results/cache_attention.json",
        ),
        ("cache_attention.json",),
        needs="pip install 'tessera[bench]'",
    ),
    Benchmark(
        "cache-attention-avx2",
        "the same with Tessera and PyTorch restricted to AVX2",
        (
            *("benchmarks/llamacpp_attention.py", "--restrict", "avx2", "--tokens", "32768", "--caches", *CACHES),
            *("--json", "docs/results/cache_attention_avx2.json"),
        ),
        ("cache_attention_avx2.json",),
        needs="pip install 'tessera[bench]'",
    ),
    Benchmark(
        "prefill-attention",
        "attention of many queries: kernels, flash attention over decoded tiles, and the definition",
        ("benchmarks/prefill_attention.py",),
        ("prefill_attention.json",),
    ),
    Benchmark(
        "model-generation",
        "first token, median and slowest step, memory of SmolLM2 by kind of cache; two generations side by side",
        ("benchmarks/generation.py", "--model", "results/models/smollm2", "--steps", "72", "--repeats", "2"),
        ("model_generation.json",),
        takes="an hour",
        needs="pip install 'tessera[bench]', and the model in results/models (benchmarks/real_models.py)",
    ),
    Benchmark(
        "model-generation-avx2",
        "the same where neither Tessera nor PyTorch may use more than AVX2",
        (
            "benchmarks/generation.py",
            *("--model", "results/models/smollm2", "--restrict", "avx2", "--steps", "72", "--repeats", "2"),
            *("--caches", "DynamicCache", "dense", "sink:4 + hqmq:4 + recent:128"),
            *("--json", "docs/results/model_generation_avx2.json"),
        ),
        ("model_generation_avx2.json",),
        takes="half an hour",
        needs="the model in results/models (benchmarks/real_models.py)",
    ),
    Benchmark(
        "query-limbs",
        "perplexity with queries in one, two and three 8-bit limbs",
        ("benchmarks/query_limbs.py",),
        ("query_limbs.json",),
        measured="2026-11-21",
        shown=("kernels.md",),
    ),
    Benchmark(
        "encode",
        "encoding: the nearest-codeword search against brute force, and whole tokens",
        ("benchmarks/encode.py",),
        ("encode.json",),
        measured="2026-11-30",
        shown=("kernels.md",),
    ),
    Benchmark(
        "triton-static",
        "the Triton attention compiled for a GPU: registers and instructions, counted without one",
        ("benchmarks/triton_static.py",),
        ("triton_static.json",),
        measured="2026-11-30",
        shown=("kernels.md",),
    ),
    Benchmark(
        "gpu",
        "correctness and speed of every Triton kernel on a device",
        ("benchmarks/gpu_all.py",),
        ("gpu.json",),
        needs="a CUDA device",
    ),
    Benchmark(
        "gpu-vllm",
        "correctness and speed of attention by block table on a device",
        ("benchmarks/gpu_vllm.py",),
        ("gpu_vllm.json",),
        needs="a CUDA device",
    ),
    Benchmark(
        "vllm-engine",
        "vLLM with packed pages: capacity of the pool, quality and speed",
        ("benchmarks/vllm_engine.py", "--rounds", "1"),
        ("vllm_engine.json",),
        "a quarter of an hour",
        "the environment of make test-vllm, --model FOLDER --text BOOK",
    ),
    Benchmark(
        "vllm-serve",
        "vLLM's server with packed pages: log, output of clients and metrics, the transcript in docs/vllm.md",
        ("benchmarks/vllm_serve.py",),
        ("vllm_serve.json",),
        "minutes",
        "the environment of make test-vllm, --model FOLDER --text BOOK",
        measured="2026-11-30",
        shown=("vllm.md",),
    ),
    Benchmark(
        "capacity",
        "number of pairs that one matrix of a Tensor Cache holds",
        ("benchmarks/capacity.py",),
        ("capacity.json",),
        measured="2026-11-21",
        shown=("tensor_cache.md",),
    ),
    Benchmark(
        "associative-cost",
        "cost of a Tensor Cache: its fast forms against the token loop, and streams of a million tokens",
        ("benchmarks/associative_cost.py",),
        ("associative_cost.json",),
        "an hour",
        measured="2026-11-29",
        shown=("tensor_cache.md",),
    ),
    Benchmark(
        "long-run",
        "accuracy of a Tensor Cache's state over a million writes",
        ("benchmarks/long_run.py",),
        ("long_run.json",),
        measured="2026-11-21",
        shown=("tensor_cache.md",),
    ),
    Benchmark(
        "recall",
        "associative recall beyond the window, by models trained from scratch",
        ("benchmarks/recall.py",),
        ("recall.json",),
        "hours",
        measured="2026-11-25",
        shown=("tensor_cache.md",),
    ),
    Benchmark(
        "language-scratch",
        "language models trained from scratch with a window of 64 tokens, with memories and without",
        ("benchmarks/language_scratch.py",),
        ("language_scratch.json",),
        "hours",
    ),
    Benchmark(
        "language-stories",
        "the same on excerpts of TinyStories",
        (
            "benchmarks/language_scratch.py",
            *("--arms", "dense", "window", "with a Tensor Cache", "with a Tensor Memory"),
            *("--seeds", "1", "--precision", "bf16", "--json", "docs/results/language_stories.json"),
        ),
        ("language_stories.json",),
        "hours",
        "--data STORIES",
        measured="2026-11-29",
        shown=(
            "tensor_cache.md",
            "tensor_memory.md",
        ),
    ),
    Benchmark(
        "memory-options",
        "effect of each option of a Tensor Cache after a short training",
        ("benchmarks/memory_options.py",),
        ("memory_options.json",),
        "hours",
        measured="2026-11-29",
        shown=("tensor_cache.md",),
    ),
    Benchmark(
        "language-memory",
        "the demo model's loss by distance from the start, with its Tensor Cache and without",
        ("benchmarks/language_memory.py",),
        ("language_memory.json",),
        measured="2026-11-25",
        shown=("tensor_cache.md",),
    ),
    Benchmark(
        "language-tuned",
        "the demo model trained further with other kinds of attention",
        ("benchmarks/language_tuned.py",),
        ("language_tuned.json",),
        "hours",
        measured="2026-11-25",
        shown=("tensor_cache.md",),
    ),
    Benchmark(
        "tensor-memory-cost",
        "cost of a Tensor Memory: its fast forms against the plain loop",
        ("benchmarks/tensor_memory_cost.py",),
        ("tensor_memory_cost.json",),
        measured="2026-11-29",
        shown=("tensor_memory.md",),
    ),
    Benchmark(
        "retention",
        "retention of writes to a Tensor Memory",
        ("benchmarks/retention.py",),
        ("retention.json",),
        measured="2026-11-29",
        shown=("tensor_memory.md",),
    ),
    Benchmark(
        "diagnostics",
        "occlusion, map building, binding and no harm: tasks that need a memory",
        ("benchmarks/diagnostics.py", "--steps", "300"),
        ("diagnostics.json",),
        "hours",
        measured="2026-11-29",
        shown=("tensor_memory.md",),
    ),
    Benchmark(
        "pictures",
        "digits classified and filled in by a small ViT, with a Tensor Memory and without",
        ("benchmarks/pictures.py",),
        ("pictures.json",),
        "an hour",
        measured="2026-11-29",
        shown=("tensor_memory.md",),
    ),
    Benchmark(
        "video",
        "digits that pass behind a bar, in clips and in streams",
        ("benchmarks/video.py",),
        ("video.json",),
        "hours",
        measured="2026-11-29",
        shown=("tensor_memory.md",),
    ),
    Benchmark(
        "families",
        "every causal family of transformers with a cache and with both memories",
        ("benchmarks/families.py",),
        ("families.json",),
        measured="2026-11-30",
        shown=("models.md",),
    ),
    Benchmark(
        "reliability",
        "count the tests behind each promise",
        ("benchmarks/reliability.py",),
        ("reliability.json",),
        measured="2026-11-30",
        shown=("reliability.md",),
    ),
    Benchmark(
        "needle",
        "a number hidden in prose, by length and depth, through nine caches; what is in the JSON is not measured again",
        ("tessera", "eval", "needle", "--out", "docs/results/long_context", "--samples", "1", "--lengths", *LENGTHS),
        ("long_context/needle.json",),
        "hours",
        "--model FOLDER, of SmolLM2-135M-Instruct",
    ),
    Benchmark(
        "ruler",
        "five of RULER's synthetic tasks through nine caches; what is in the JSON is not measured again",
        (
            "tessera",
            "eval",
            "ruler",
            "--out",
            "docs/results/long_context",
            "--samples",
            "1",
            "--tasks",
            *TASKS,
            "--lengths",
            *RULER_LENGTHS,
        ),
        ("long_context/ruler.json",),
        "hours",
        "--model FOLDER, of SmolLM2-135M-Instruct",
    ),
    Benchmark("plan-errors", "the errors by which tessera plan ranks caches, from real-models", ("benchmarks/plan_errors.py",)),
    Benchmark("tables", "write the tables of the documents from docs/results", ("benchmarks/tables.py",), takes="seconds"),
    Benchmark("layers", "draw what imports what", ("docs/layers.py",), takes="seconds"),
)
#: Files of this folder that are modules, not scripts.
HELPERS = ("instruction_sets.py", "model_generation.py", "run.py", "stretches.py", "timing.py")


def find(name: str) -> Benchmark:
    """Return the benchmark of a name.

    Raises:
        ValueError: if there is none.
    """
    for each in BENCHMARKS:
        if each.name == name:
            return each
    raise ValueError(f"there is no benchmark {name!r}; python benchmarks/run.py lists them")


def listing() -> str:
    """Return the list of all benchmarks, two or three lines each."""
    lines = ["python benchmarks/run.py NAME [arguments], or --all for all that needs nothing more:", ""]
    for each in BENCHMARKS:
        facts = [f"takes {each.takes}"] + [f"needs {each.needs}"] * bool(each.needs)
        facts += [f"writes {' '.join(f'docs/results/{file}' for file in each.results)}"] * bool(each.results)
        lines += [f"{each.name}: {each.measures}", f"    {'; '.join(facts)}"]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """List, or run.

    Returns:
        The exit status of the first command that fails, else 0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="name of a benchmark; without it all are listed")
    parser.add_argument("more", nargs=argparse.REMAINDER, help="arguments for it")
    parser.add_argument("--all", action="store_true", help="run all that need nothing further, one after the other")
    options = parser.parse_args(arguments)
    if options.all:
        chosen = [each.line() for each in BENCHMARKS if not each.needs]
    elif options.name is None:
        print(listing())
        return 0
    else:
        try:
            chosen = [find(options.name).line(options.more)]
        except ValueError as error:
            parser.error(str(error))
    for line in chosen:
        print("$", shlex.join(line), flush=True)
        status = subprocess.run(line, cwd=ROOT, check=False).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
