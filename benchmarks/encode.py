"""Encoding: the search for the nearest codeword against comparing all of them, and what a token costs.

1. For each codebook, nanoseconds a chunk of four numbers: the C++ search, the same search in PyTorch, and the brute-force
   search over all codewords, which defines it; and how many indices differ from those of brute force. Chunks as near to two
   codewords as float32 resolves do not count.
2. Milliseconds to encode the keys and values of one token in all layers of an 8-billion-parameter Llama (32 layers, 8 key
   heads, head_dim 128), one token at a time and in the blocks that the cache compresses.

Example:

    python benchmarks/encode.py
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tessera import codecs
from tessera.codecs.codebooks import joint
from tessera.codecs.hqmq import HQMQ
from tessera.evaluation.records import environment
from tessera.files import atomic_path
from tessera.kernels import cpu, dispatch
from tessera.kernels.nearest import brute_force, build_index
from tessera.quaternion import conjugate, right_matrix
from timing import medians

ROOT = Path(__file__).resolve().parent.parent
SPECS = ("hqmq:2", "hqmq:3", "hqmq:3.5", "hqmq:4", "hqmq:5", "hqmq:s96_r4")
LAYERS, KV_HEADS, DIM = 32, 8, 128
#: Tokens encoded together: one, and the cache's block.
BLOCKS = (1, 64)


def search(spec: str, chunks: int, few: int, repeats: int) -> dict[str, Any]:
    """One codebook's row. Brute force is timed on the first `few` of the chunks."""
    codec = codecs.get(spec)
    if isinstance(codec, HQMQ):
        return search_directions(codec, chunks, few, repeats)
    book = joint(codec.code_bits)  # type: ignore[attr-defined]
    index = build_index(book.products.float() * book.step, book.conjugations)
    x = torch.randn(chunks, 4)
    part = x[:few]
    runs: dict[str, Callable[[], Tensor]] = {
        "brute force": lambda: brute_force(part, index.words),
        "PyTorch": lambda: dispatch.nearest(x, index, book.codes, backend="reference"),
    }
    if cpu.MISSING is None:
        runs["C++"] = lambda: dispatch.nearest(x, index, book.codes, backend="cpu")
    seconds = medians(runs, repeats)
    wanted = book.codes[runs["brute force"]()]
    got = runs["C++" if "C++" in runs else "PyTorch"]()[:few].long()
    words = book.codewords.double() * book.step
    gap = (part - words[got]).norm(dim=-1) - (part - words[wanted]).norm(dim=-1)
    return row(spec, len(words), seconds, chunks, few, gap, got != wanted)


def search_directions(codec: HQMQ, chunks: int, few: int, repeats: int) -> dict[str, Any]:
    """The row of a codebook of directions, of which the largest inner product is searched."""
    words = codec.directions(1, "key", 0)[0]
    turns = right_matrix(conjugate(codec.secondaries(1, "key", 0)))
    x = torch.randn(chunks, 4)
    part, lines = x[:few], x.view(1, 1, 1, chunks, 4)
    runs: dict[str, Callable[[], Tensor]] = {
        "brute force": lambda: (part @ words.T).argmax(-1),
        "PyTorch": lambda: dispatch.nearest_directions(lines, turns, backend="reference")[0],
    }
    if cpu.MISSING is None:
        runs["C++"] = lambda: dispatch.nearest_directions(lines, turns, backend="cpu")[0]
    seconds = medians(runs, repeats)
    wanted = runs["brute force"]()
    got = runs["C++" if "C++" in runs else "PyTorch"]().view(-1)[:few].long()
    # Code 24 s + p is word s · 24 + p, see `HQMQ.directions`.
    exact = words.double()
    gap = (part * exact[wanted]).sum(-1) - (part * exact[got]).sum(-1)
    return row(codec.spec, len(words), seconds, chunks, few, gap, got != wanted)


def row(
    spec: str, codewords: int, seconds: dict[str, float], chunks: int, few: int, gap: Tensor, other: Tensor
) -> dict[str, Any]:
    """One row; gap: how much worse what was found is than what brute force found; other: whether it is another."""
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


def token(spec: str, repeats: int) -> dict[str, Any]:
    """Milliseconds a token, of a codec."""
    codec = codecs.get(spec)
    runs: dict[str, Callable[[], object]] = {}
    for block in BLOCKS:
        k, v = torch.randn(2, 1, KV_HEADS, block, DIM).bfloat16().unbind(0)
        runs[str(block)] = lambda k=k, v=v: (codec.encode(k, "key"), codec.encode(v))  # type: ignore[misc]
    seconds = medians(runs, repeats)
    return {"spec": spec, "milliseconds": {name: 1e3 * LAYERS * value / int(name) for name, value in seconds.items()}}


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--specs", nargs="+", default=SPECS, help="codecs with a joint codebook, or of directions")
    parser.add_argument("--chunks", type=int, default=1 << 16)
    parser.add_argument("--few", type=int, default=1 << 11, help="of them that are searched by brute force")
    parser.add_argument("--repeats", type=int, default=7, help="of which the median is taken")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "encode.json")
    options = parser.parse_args()
    if not 0 < options.few <= options.chunks:
        parser.error(f"--few must be between 1 and --chunks; got {options.few} and {options.chunks}")
    torch.manual_seed(0)
    record: dict[str, Any] = {"environment": environment(), "repeats": options.repeats, "search": [], "token": []}
    for spec in options.specs:
        record["search"].append(search(spec, options.chunks, options.few, options.repeats))
        record["token"].append(token(spec, options.repeats))
    with atomic_path(options.json) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    table = Table("codec", "codewords", "brute force, ns", "search, ns", "times faster", "other indices", "ms a token")
    for row, cost in zip(record["search"], record["token"], strict=True):
        fast = "C++" if "C++" in row["nanoseconds"] else "PyTorch"
        table.add_row(
            row["spec"],
            f"{row['codewords']:,}",
            f"{row['nanoseconds']['brute force']:,.0f}",
            f"{row['nanoseconds'][fast]:.0f}",
            f"{row['times_brute_force'][fast]:,.0f}",
            str(row["other_indices"]),
            f"{cost['milliseconds'][str(BLOCKS[-1])]:.2f}",
        )
    Console().print(table)
    Console().print(f"Saved {options.json}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
