"""Time encoding: the nearest-codeword search against brute force, and whole vectors and tokens.

1. For each codebook, nanoseconds a chunk of four numbers on one core: the C++ search at each instruction set that the processor
   has, the same search in PyTorch, and the brute-force search over all codewords, which defines it; and how many indices differ
   from those of brute force. Chunks that are equidistant from two codewords within float32 rounding are excluded.
2. For each codec, nanoseconds a chunk on one core of whole encoding, of keys and of values, many vectors and few; and of keys
   with the errors of later chunks fed back, as a cache encodes them, for codecs that support it.
3. Milliseconds on one core to encode the keys and values of one token in all layers of an 8-billion-parameter Llama (32 layers,
   8 key heads, head_dim 128), one token at a time and in the blocks that the cache compresses.

Example:

    python benchmarks/encode.py
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tessera import codecs
from tessera.codecs.codebooks import joint
from tessera.codecs.hqmq import HQMQ
from tessera.codecs.hqmq_joint import JointHQMQ, words_of
from tessera.evaluation.records import environment
from tessera.files import atomic_path
from tessera.kernels import cpu, dispatch
from tessera.kernels.nearest import brute_force
from tessera.quaternion import conjugate, right_matrix
from timing import minima

ROOT = Path(__file__).resolve().parent.parent
SPECS = ("hqmq:2", "hqmq:2.5", "hqmq:3", "hqmq:3.5", "hqmq:4", "hqmq:4.5", "hqmq:5", "hqmq:s96_r4")
#: Repetitions of the slow measurements, PyTorch and brute force.
SLOW = 2
#: Codecs without a codebook search.
OTHERS = ("scalar:4", "kivi:4", "int:4", "q4_0", "q8_0")
LAYERS, KV_HEADS, DIM = 32, 8, 128
#: Numbers of tokens encoded together: one, and a block of the cache.
BLOCKS = (1, 64)
#: Shapes for whole encoding: (batch, key heads, tokens, head_dim).
SHAPES = ((1, 8, 4096, 128), (1, 3, 64, 64))
#: Number of elements from which whole encoding is repeated a tenth as often.
MANY = 1 << 18


@contextmanager
def one_core() -> Iterator[None]:
    """Run PyTorch and the kernels on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Set TESSERA_BACKEND within a block."""
    before = os.environ.get("TESSERA_BACKEND")
    os.environ["TESSERA_BACKEND"] = name
    try:
        yield
    finally:
        del os.environ["TESSERA_BACKEND"]
        if before is not None:
            os.environ["TESSERA_BACKEND"] = before


def in_backend(name: str, run: Callable[[], object]) -> None:
    """Return a function that calls with a backend."""
    with backend(name):
        run()


def search(spec: str, chunks: int, few: int, repeats: int) -> dict[str, Any]:
    """Measure one codebook. Brute force is timed on the first `few` of the chunks."""
    codec = codecs.get(spec)
    if isinstance(codec, HQMQ):
        return search_directions(codec, chunks, few, repeats)
    assert isinstance(codec, JointHQMQ)
    book, words = joint(codec.code_bits), words_of(codec.code_bits)
    x = torch.randn(chunks, 4)
    part = x[:few]
    products = words.products.float() * words.step
    slow: dict[str, Callable[[], Tensor]] = {
        "brute force": lambda: brute_force(part, products),
        "PyTorch": lambda: dispatch.nearest(x, words, backend="reference"),
    }
    fast: dict[str, Callable[[], Tensor]] = {
        level: partial(dispatch.nearest, x, words, backend=f"cpu:{level}") for level in cpu.levels()
    }
    runs = slow | fast
    began = time.perf_counter()
    runs[best("brute force")]()  # the first search builds the tables
    built = time.perf_counter() - began
    seconds = minima(slow, SLOW) | minima(fast, repeats)
    wanted = book.codes[runs["brute force"]()]
    got = runs[best("PyTorch")]()[:few].long()
    exact = book.codewords.double() * book.step
    gap = (part - exact[got]).norm(dim=-1) - (part - exact[wanted]).norm(dim=-1)
    return {**row(spec, len(exact), seconds, chunks, few, gap, got != wanted), "first_seconds": built}


def best(otherwise: str) -> str:
    """Return the time with the best instruction set, or the only time if there is no choice."""
    return cpu.levels()[-1] if cpu.levels() else otherwise


def search_directions(codec: HQMQ, chunks: int, few: int, repeats: int) -> dict[str, Any]:
    """Measure a codebook of directions, which is searched for the largest inner product.

    The dynamic loader chooses the instruction set.
    """
    words = codec.directions(1, "key", 0)[0]
    matrices = right_matrix(conjugate(codec.secondaries(1, "key", 0)))
    x = torch.randn(chunks, 4)
    part, lines = x[:few], x.view(1, 1, 1, chunks, 4)
    slow: dict[str, Callable[[], Tensor]] = {
        "brute force": lambda: (part @ words.T).argmax(-1),
        "PyTorch": lambda: dispatch.nearest_directions(lines, matrices, backend="reference")[0],
    }
    fast: dict[str, Callable[[], Tensor]] = {}
    if cpu.MISSING is None:
        fast[best("")] = lambda: dispatch.nearest_directions(lines, matrices, backend="cpu")[0]
    runs, seconds = slow | fast, minima(slow, SLOW) | minima(fast, repeats)
    wanted = runs["brute force"]()
    got = runs[best("PyTorch")]().view(-1)[:few].long()
    # Code 24 s + p is word s · 24 + p, see `HQMQ.directions`.
    exact = words.double()
    gap = (part * exact[wanted]).sum(-1) - (part * exact[got]).sum(-1)
    return row(codec.spec, len(words), seconds, chunks, few, gap, got != wanted)


def row(
    spec: str, codewords: int, seconds: dict[str, float], chunks: int, few: int, gap: Tensor, other: Tensor
) -> dict[str, Any]:
    """Make a row. gap: excess distance over brute force's codeword; other: whether the index differs from brute force's."""
    nanoseconds = {name: 1e9 * value / (few if name == "brute force" else chunks) for name, value in seconds.items()}
    return {
        "spec": spec,
        "codewords": codewords,
        "nanoseconds": nanoseconds,
        "times_brute_force": {name: nanoseconds["brute force"] / value for name, value in nanoseconds.items()},
        "compared": few,
        "other_indices": int((gap.abs() > 1e-6).sum()),
        "ties": int((other & (gap.abs() <= 1e-6)).sum()),
    }


def whole(spec: str, shapes: tuple[tuple[int, ...], ...], repeats: int) -> list[dict[str, Any]]:
    """Measure nanoseconds per chunk of `Codec.encode` at each instruction set and in PyTorch."""
    codec = codecs.get(spec)
    rows = []
    for shape in shapes:
        x, weights = torch.randn(shape), torch.exp2(-1.5 * torch.randint(0, 8, (*shape[:2], shape[3])).float())
        kinds = {"key": partial(codec.encode, x, "key"), "value": partial(codec.encode, x, "value")}
        if codec.weighs:
            kinds["weighed key"] = partial(codec.encode, x, "key", weights=weights)
        often = repeats if x.numel() < MANY else -(-repeats // 10)
        seconds: dict[str, float] = {}
        for names, times in (({level: f"cpu:{level}" for level in cpu.levels()}, often), ({"PyTorch": "reference"}, SLOW)):
            runs: dict[str, Callable[[], object]] = {}
            for kind, encode in kinds.items():
                for name, asked in names.items():
                    runs[f"{kind}, {name}"] = partial(in_backend, asked, encode)
            seconds.update(minima(runs, times))
        rows.append({"spec": spec, "shape": list(shape), "nanoseconds": {n: 4e9 * s / x.numel() for n, s in seconds.items()}})
    return rows


def token(spec: str, repeats: int) -> dict[str, Any]:
    """Measure milliseconds per token of a codec."""
    codec = codecs.get(spec)
    runs: dict[str, Callable[[], object]] = {}
    for block in BLOCKS:
        k, v = torch.randn(2, 1, KV_HEADS, block, DIM).bfloat16().unbind(0)
        runs[str(block)] = lambda k=k, v=v: (codec.encode(k, "key"), codec.encode(v))  # type: ignore[misc]
    seconds = minima(runs, repeats)
    return {"spec": spec, "milliseconds": {name: 1e3 * LAYERS * value / int(name) for name, value in seconds.items()}}


def show(record: dict[str, Any]) -> None:
    """Print the times of the searches, of a token, and of whole encoding."""
    table = Table("codec", "codewords", "brute force, ns", *cpu.levels(), "other indices", "ms a token")
    for found, cost in zip(record["search"], record["token"], strict=True):
        ns = found["nanoseconds"]
        levels = (f"{ns[level]:.1f}" if level in ns else "" for level in cpu.levels())
        ms = f"{cost['milliseconds'][str(BLOCKS[-1])]:.2f}"
        table.add_row(
            found["spec"], f"{found['codewords']:,}", f"{ns['brute force']:,.0f}", *levels, str(found["other_indices"]), ms
        )
    Console().print(table)
    table = Table("codec", "shape", "keys, ns", "values, ns", "keys in PyTorch, ns", "values in PyTorch, ns")
    for found in record["whole"]:
        names = [f"{kind}, {name}" for name in (best("PyTorch"), "PyTorch") for kind in ("key", "value")]
        table.add_row(found["spec"], str(found["shape"]), *(f"{found['nanoseconds'][name]:.0f}" for name in names))
    Console().print(table)


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--specs", nargs="+", default=SPECS, help="codecs with a joint codebook, or of directions")
    parser.add_argument("--others", nargs="*", default=OTHERS, help="codecs of which only whole encoding is measured")
    parser.add_argument("--chunks", type=int, default=1 << 15)
    parser.add_argument("--few", type=int, default=1 << 9, help="number of chunks that are searched by brute force")
    parser.add_argument("--tokens", type=int, default=SHAPES[0][2], help="number of tokens for the encoding of many vectors")
    parser.add_argument("--repeats", type=int, default=50, help="number of calls of a fast operation; the shortest counts")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "encode.json")
    options = parser.parse_args()
    if not 0 < options.few <= options.chunks:
        parser.error(f"--few must be between 1 and --chunks; got {options.few} and {options.chunks}")
    torch.manual_seed(0)
    record: dict[str, Any] = {"environment": environment(), "instructions": cpu.levels(), "repeats": options.repeats}
    with one_core():
        record["search"] = [search(spec, options.chunks, options.few, options.repeats) for spec in options.specs]
        shapes = ((*SHAPES[0][:2], options.tokens, SHAPES[0][3]), SHAPES[1])
        record["whole"] = [row for spec in (*options.specs, *options.others) for row in whole(spec, shapes, options.repeats)]
        record["token"] = [token(spec, options.repeats) for spec in options.specs]
    with atomic_path(options.json) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    show(record)
    Console().print(f"Saved {options.json}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
