"""Time attention of one new token over a long cache: the compressed cache against PyTorch's dense implementations.

Every dense implementation of PyTorch is timed, for keys and values in bfloat16, float16 and float32; the fastest is the
baseline. The cache is packed as `tessera.Cache` packs it. Times are medians of interleaved calls; ratios are what counts.
`--level avx2` restricts PyTorch as well, to what it does on a processor without AVX-512.

Example:

    python benchmarks/decode_attention.py
    python benchmarks/decode_attention.py --tokens 4096 --shapes 32,8,128 --json out.json
    python benchmarks/decode_attention.py --level avx2 --json out.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from instruction_sets import VARIABLES, environment_within, restrict
from tessera import codecs
from tessera.codecs import Packed
from tessera.files import atomic_path
from tessera.kernels import AttendParams, CompressedKV, cpu, dispatch, reference
from tessera.kernels.joint import JointFormat
from tessera.tiers import PAGE
from timing import medians

ROOT = Path(__file__).resolve().parent.parent
#: Query heads, key heads, head_dim.
SHAPES = ("32,8,128", "28,4,128", "32,8,64")
TOKENS = (4096, 32768)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Configurations of the HQMQ paper, the second with outlier chunks.
PAPER = ("hqmq:s96_r4", "hqmq:s96_r4_med3")
#: Baselines, and codecs for keys and values of different kinds.
OTHERS = ("q4_0", "q8_0", "int:4", "kivi:4", "scalar:4", "fp8", "(k=q8_0,v=hqmq:3)")


def dense_ways(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], object]]:
    """Return PyTorch's implementations of attention to dense keys and values, by name; all three tensors have one dtype."""
    _, heads, _, dim = q.shape
    _, kv_heads, tokens, _ = k.shape
    scale = dim**-0.5
    grouped = q.view(kv_heads, heads // kv_heads, dim)
    flat_k, flat_v = k.view(kv_heads, tokens, dim), v.view(kv_heads, tokens, dim)

    def matmul() -> Tensor:
        scores = (grouped @ flat_k.transpose(1, 2)).float() * scale
        return scores.softmax(-1).to(q.dtype) @ flat_v

    folded = grouped[None]
    dtype = str(q.dtype).removeprefix("torch.")
    return {
        f"{dtype}, matmul, grouped": matmul,
        f"{dtype}, sdpa, enable_gqa": lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True),
        f"{dtype}, sdpa, queries of a group folded": lambda: scaled_dot_product_attention(folded, k, v, scale=scale),
    }


def pages_of(spec: str, kv_heads: int, tokens: int, dim: int) -> CompressedKV:
    """Make pages in separate memory. One is encoded and copied, since its contents do not affect the time."""
    codec = codecs.get(spec)
    size = min(PAGE, tokens)
    k, v = torch.randn(2, 1, kv_heads, size, dim).unbind(0)
    first = codec.encode(k, "key"), codec.encode(v)

    def copy(packed: Packed) -> Packed:
        return replace(packed, tensors={name: tensor.clone() for name, tensor in packed.tensors.items()})

    return CompressedKV([(copy(first[0]), copy(first[1])) for _ in range(tokens // size)])


def measure(shape: str, tokens: int, repeats: int, specs: tuple[str, ...], level: str | None) -> list[dict[str, Any]]:
    """Measure one shape and length, at one instruction set of the CPU kernels."""
    heads, kv_heads, dim = map(int, shape.split(","))
    q = torch.randn(1, heads, 1, dim)
    k, v = torch.randn(2, 1, kv_heads, tokens, dim).unbind(0)
    dense: dict[str, Callable[[], object]] = {}
    nbytes = {}
    for dtype in DTYPES:
        ways = dense_ways(q.to(dtype), k.to(dtype), v.to(dtype))
        dense |= ways
        nbytes |= dict.fromkeys(ways, 2 * k.numel() * dtype.itemsize)
    runs = dict(dense)
    scale = dim**-0.5
    for spec in specs:
        pages = pages_of(spec, kv_heads, tokens, dim)
        kept = sum(packed.nbytes for page in pages.pages for packed in page)
        if cpu.attend_refusal(q, pages) is None:
            in_limbs = level != "portable" and all(isinstance(form, JointFormat) for form in pages.form())
            for limbs in (1, 2, 3) if in_limbs else (cpu.LIMBS,):
                name = f"{spec}, {8 * limbs}-bit queries" if in_limbs else spec
                runs[name] = lambda pages=pages, limbs=limbs: cpu.attend(
                    q, pages, AttendParams(scale), level=level, limbs=limbs
                )  # type: ignore[misc]
                nbytes[name] = kept
        else:
            runs[spec] = lambda pages=pages: dispatch.attend(q, pages, AttendParams(scale))  # type: ignore[misc]
            nbytes[spec] = kept
    if specs and cpu.MISSING is None:
        pages = pages_of(specs[0], kv_heads, tokens, dim)
        name = f"{specs[0]}, plain PyTorch"
        runs[name] = lambda: reference.attend(q, pages, AttendParams(scale))
        nbytes[name] = sum(packed.nbytes for page in pages.pages for packed in page)
    seconds = medians(runs, repeats)
    peer = min(dense, key=seconds.__getitem__)
    return [
        {
            "shape": shape,
            "tokens": tokens,
            "name": name,
            "peer": peer,
            "dense": name in dense,
            "milliseconds": 1e3 * seconds[name],
            "times_the_peer": seconds[peer] / seconds[name],
            "bytes": nbytes[name],
            "bytes_of_dense": nbytes[name] / (2 * k.numel() * torch.bfloat16.itemsize),
        }
        for name in runs
    ]


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="lengths of the cache, multiples of 64")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="H,KV,D", help="query heads, key heads, head_dim")
    specs = ("hqmq:4", "hqmq:3", *PAPER, *OTHERS)
    parser.add_argument("--codecs", "--specs", dest="specs", nargs="+", default=specs, metavar="CODEC", help="codecs")
    best = cpu.levels()[-1] if cpu.levels() else None
    parser.add_argument("--level", choices=cpu.levels(), default=best, help="instruction set; default: the best here")
    parser.add_argument("--repeats", type=int, default=9, help="number of calls, of which the median is taken")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "decode_attention.json")
    options = parser.parse_args()
    restricted = options.level if options.level in VARIABLES and options.level != best else None
    restrict(restricted)
    if any(tokens < 64 or tokens % min(PAGE, tokens) for tokens in options.tokens):
        parser.error(f"--tokens must be at least 64, and multiples of {PAGE} above it; got {options.tokens}")
    torch.manual_seed(0)
    rows = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=len(options.shapes) * len(options.tokens))
        for shape in options.shapes:
            for tokens in options.tokens:
                rows += measure(shape, tokens, options.repeats, tuple(options.specs), options.level)
                progress.advance(task)
    vectors = torch.backends.cpu.get_cpu_capability()
    about = {**environment_within(restricted), "levels": ", ".join(cpu.levels()), "level": options.level, "pytorch": vectors}
    record = {"environment": about, "repeats": options.repeats, "rows": rows}
    with atomic_path(options.json) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console = Console()
    for shape in options.shapes:
        for tokens in options.tokens:
            table = Table(title=f"{shape} (query heads, key heads, head_dim), {tokens:,} tokens", title_justify="left")
            for column in ("way", "ms", "speed of the fastest dense way", "bytes of dense"):
                table.add_column(column, justify="left" if column == "way" else "right")
            for row in (r for r in rows if (r["shape"], r["tokens"]) == (shape, tokens)):
                style = "dim" if row["dense"] else None
                cells = (f"{row['milliseconds']:.3f}", f"{row['times_the_peer']:.2f}x", f"{row['bytes_of_dense']:.3f}")
                table.add_row(row["name"], *cells, style=style)
            console.print(table)
    console.print(f"Saved {options.json}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
