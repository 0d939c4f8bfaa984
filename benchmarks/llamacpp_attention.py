"""Time attention of a decoding step against llama.cpp, a CPU engine with attention over quantised caches, in one run.

Both sides run a Llama with the attention of an 8-billion-parameter model (32 query heads, 8 key heads, head_dim 128) and
everything else narrow, random weights, and the same number of threads. "attention" is the time of a step minus that of one with
an empty cache, which is the cost of the context. llama.cpp runs with flash attention and caches of f16, q8_0 and q4_0; its
model is written as a GGUF file, and its cache is filled in separate sequences that do not see each other and are then
joined, since the contents do not affect the time of a step. Needs pip install 'tessera[bench]'; llama-cpp-python is built from
source for the machine it is installed on, and keeps its instructions when `--restrict` limits Tessera and PyTorch.

Example:

    python benchmarks/llamacpp_attention.py
    python benchmarks/llamacpp_attention.py --restrict avx2 --json out.json
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import generation
from instruction_sets import VARIABLES, environment_within, restrict
from tessera.files import atomic_path

ROOT = Path(__file__).resolve().parent.parent
HEADS, KV_HEADS, DIM, WIDTH, VOCABULARY = 32, 8, 128, 256, 256
#: Cache types of llama.cpp and their ids in ggml.
TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}
#: Bits per element.
BITS = {"f16": 16.0, "q8_0": 8.5, "q4_0": 4.5}
SPECS = ("sink:4 + hqmq:4 + recent:128", "sink:4 + hqmq:3 + recent:128")
#: Tokens per sequence while llama.cpp's cache is filled.
PIECE = 512


def write_model(path: Path, layers: int) -> None:
    """Write a GGUF file of random weights."""
    import gguf

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(DIM)
    writer.add_value_length(DIM)
    writer.add_rope_dimension_count(DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")

    def put(name: str, *shape: int) -> None:
        scale = 1.0 if len(shape) == 1 else shape[-1] ** -0.5
        values = np.ones(shape) if len(shape) == 1 else rng.standard_normal(shape) * scale
        writer.add_tensor(name, values.astype(np.float32 if len(shape) == 1 else np.float16))

    put("token_embd.weight", VOCABULARY, WIDTH)
    put("output_norm.weight", WIDTH)
    put("output.weight", VOCABULARY, WIDTH)
    for i in range(layers):
        put(f"blk.{i}.attn_norm.weight", WIDTH)
        put(f"blk.{i}.attn_q.weight", HEADS * DIM, WIDTH)
        put(f"blk.{i}.attn_k.weight", KV_HEADS * DIM, WIDTH)
        put(f"blk.{i}.attn_v.weight", KV_HEADS * DIM, WIDTH)
        put(f"blk.{i}.attn_output.weight", WIDTH, HEADS * DIM)
        put(f"blk.{i}.ffn_norm.weight", WIDTH)
        put(f"blk.{i}.ffn_gate.weight", WIDTH, WIDTH)
        put(f"blk.{i}.ffn_up.weight", WIDTH, WIDTH)
        put(f"blk.{i}.ffn_down.weight", WIDTH, WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A context of llama.cpp whose cache has room for `tokens`."""

    def __init__(self, path: Path, kind: str, tokens: int, threads: int) -> None:
        import llama_cpp

        self.api = llama_cpp
        llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = tokens + 2 * PIECE
        params.n_batch = params.n_ubatch = PIECE
        params.n_seq_max = tokens // PIECE + 1
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = TYPES[kind]
        params.flash_attn_type = 1  # enabled
        self.context = llama_cpp.llama_init_from_model(model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context for {kind} at {tokens} tokens")
        self.length = 0
        for piece in range(tokens // PIECE):
            self._decode(PIECE, piece + 1)
        memory = llama_cpp.llama_get_memory(self.context)
        for piece in range(tokens // PIECE):
            llama_cpp.llama_memory_seq_cp(memory, piece + 1, 0, -1, -1)

    def _decode(self, count: int, sequence: int) -> None:
        batch = self.api.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for i in range(count):
            batch.token[i] = (self.length + i) % VOCABULARY
            batch.pos[i] = self.length + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = i == count - 1
        code = self.api.llama_decode(self.context, batch)
        self.api.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        self.length += count

    def steps(self, count: int) -> float:
        """Return the median seconds of a decoding step."""
        times = []
        for _ in range(count):
            began = time.perf_counter()
            self._decode(1, 0)
            self.api.llama_synchronize(self.context)
            times.append(time.perf_counter() - began)
        return median(times[1:])


def _silent(_level: int, _text: bytes, _data: object) -> None:
    """Discard llama.cpp's log."""


try:
    from llama_cpp import llama_log_callback

    _SILENT: Any = llama_log_callback(_silent)
except ImportError:
    _SILENT = None


def measure_llama(kind: str, tokens: int, layers: int, count: int, channel: Connection) -> None:
    """Measure one of llama.cpp's cache types, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_model(path, layers)
        threads = torch.get_num_threads()
        empty = LlamaCpp(path, kind, 0, threads).steps(count)
        seconds = LlamaCpp(path, kind, tokens, threads).steps(count)
    channel.send({"step_ms": 1e3 * seconds, "attention_ms": 1e3 * (seconds - empty)})


def run(name: str, tokens: int, layers: int, count: int) -> dict[str, Any]:
    """Measure one row in a separate process."""
    if name not in TYPES:
        return generation.run(name, tokens, layers, count, width=WIDTH)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=measure_llama, args=(name, tokens, layers, count, there))
    process.start()
    there.close()
    try:
        row: dict[str, Any] = here.recv()
    except EOFError:
        raise SystemExit(f"llama.cpp with {name} at {tokens} tokens failed") from None
    process.join()
    return {"cache": f"llama.cpp, {name}", "tokens": tokens, "bits": BITS[name], **row}


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=(4096, 16384, 32768), help=f"multiples of {PIECE}")
    parser.add_argument("--caches", nargs="+", default=(*TYPES, "DynamicCache", *SPECS))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30, help="tokens decoded, of which the first does not count")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "llamacpp_attention.json")
    parser.add_argument("--restrict", choices=VARIABLES, help="instruction set that Tessera and PyTorch may not exceed")
    options = parser.parse_args()
    restrict(options.restrict)
    if any(tokens % PIECE or tokens < PIECE for tokens in options.tokens):
        parser.error(f"--tokens must be multiples of {PIECE}; got {options.tokens}")
    if _SILENT is None:
        parser.error("llama-cpp-python is not installed: pip install 'tessera[bench]'")
    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=len(options.tokens) * len(options.caches))
        for tokens in options.tokens:
            for name in options.caches:
                rows.append(run(name, tokens, options.layers, options.steps))
                progress.advance(task)
    about = environment_within(options.restrict)
    record = {"layers": options.layers, "steps": options.steps, "environment": about, "rows": rows}
    with atomic_path(options.json) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    table = Table("cache", "tokens", "ms a step", "of them attention")
    for row in rows:
        table.add_row(row["cache"], f"{row['tokens']:,}", f"{row['step_ms']:.2f}", f"{row['attention_ms']:.2f}")
    Console().print(table)
    Console().print(f"Saved {options.json}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
