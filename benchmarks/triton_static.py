"""Analyse the compiled Triton attention statically, without a GPU.

For each way to read codes: registers of a thread, bytes spilled to memory, shared memory of a program, and the machine
instructions of all warps for a block of 64 tokens of one key head. Instructions that only groups with narrowed channels need
are counted too; `hqmq:4_nocentre` has none.

For comparison: the instructions that a multiprocessor can issue in the time in which its share of memory bandwidth delivers
these keys and values in float16, and in coded form. More instructions than the first cannot be faster than dense attention;
fewer than the second leave the kernel memory-bound. The figures are an H200's, 4.8 TB/s, 132 multiprocessors that issue 4
instructions per cycle at 1.75 GHz. They bound the speed from above and do not predict it.

Example:

    python benchmarks/triton_static.py
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled

import torch
import triton as compiler
from triton.backends.compiler import GPUTarget

from tessera import codecs
from tessera.codecs import Role
from tessera.files import write_json
from tessera.kernels.joint import JointFormat
from tessera.kernels.scalars import ScalarFormat
from tessera.kernels.triton.attend_kernel import BLOCK, attend_kernel
from tessera.kernels.triton.block_table import block_of
from tessera.kernels.triton.formats import Readable, code_options, lookups, options, readable, usual_lookup
from tessera.kernels.triton.tables import tables

ROOT = Path(__file__).resolve().parent.parent
#: Compute capability; bytes of memory and instructions per nanosecond of a multiprocessor.
CAPABILITY, BYTES, ISSUES = 90, 4800 / 132, 4 * 1.75
POINTERS = {
    "shifted": "fp16",
    "rotation": "fp16",
    "blocks": "i64",
    "moves": "i32",
    "v_moves": "i32",
    "mask": "u8",
    **dict.fromkeys(("q", "unit", "scales", "v_scales", "out", "lse"), "fp32"),
}
FLAGS = {"MASKED": False, "PLACED": True, "WINDOWED": False, "CAPPED": False}
#: Codec, head_dim and rows of queries of each kernel.
CASES = (
    ("hqmq:4", 128, 16),
    ("hqmq:4", 128, 32),
    ("hqmq:4", 64, 16),
    ("hqmq:4", 256, 16),
    ("hqmq:3", 128, 16),
    ("hqmq:k4v3", 128, 16),
    ("hqmq:4_nocentre", 128, 16),
    ("scalar:4", 128, 16),
    ("scalar:3", 128, 16),
    ("int:4", 128, 16),
    ("int:8", 128, 16),
    ("fp8", 128, 16),
    ("q4_0", 128, 16),
    ("q8_0", 128, 16),
    ("kivi:4", 128, 16),
    ("(k=q8_0,v=hqmq:3)", 128, 16),
)
ROLES: tuple[Role, ...] = ("key", "value")
TYPES = {torch.int64: "i64", torch.int32: "i32", torch.float16: "fp16"}


def tool(name: str, *arguments: str) -> str:
    """Run one of NVIDIA's tools that come with Triton, and return its output."""
    program = Path(compiler.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, check=True).stdout


def forms(spec: str, dim: int) -> list[Readable]:
    """Return the formats of keys and of values."""
    found = [codecs.get(spec).side(role).kernel_format(dim) for role in ROLES]
    assert all(readable(form) for form in found)
    return found


def built(spec: str, dim: int, rows: int, ways: Sequence[str]) -> Any:
    """Compile the kernel with these lookups of keys and of values."""
    sides = forms(spec, dim)
    codes, value_codes = (code_options(form, way, dim, 16) for form, way in zip(sides, ways, strict=True))
    centred = isinstance(sides[0], JointFormat) and sides[0].group > 1
    fixed = options(dim, rows, codes, value_codes, block_of(sides[0])[0])
    fixed |= {**FLAGS, "APART": sides[0] is not sides[1], "CENTRED": centred}
    how = {name: fixed.pop(name) for name in ("num_warps", "num_stages")}
    pointers = dict(POINTERS)
    for name, form, way in zip(("table", "v_table"), sides, ways, strict=True):
        pointers[name] = TYPES[tables(form, way, torch.device("cpu"))[0].dtype]
    numbers = dict.fromkeys(("step", "v_step", "softcap"), "fp32")
    signature, aligned = {}, {}
    for place, name in enumerate(attend_kernel.arg_names):
        if name in fixed:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = f"*{pointers[name]}"
            aligned[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = numbers.get(name, "i32")
    source = compiler.compiler.ASTSource(
        attend_kernel, signature, {(attend_kernel.arg_names.index(name),): value for name, value in fixed.items()}, aligned
    )
    return compiler.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=how)


def longest_loop(listing: str) -> int:
    """Return the number of instructions of the longest loop in a disassembly."""
    labels: dict[str, int] = {}
    count = longest = 0
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            count += 1
            target = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction[1])
            if target and target[1] in labels:
                longest = max(longest, count - labels[target[1]])
    return longest


def row_bytes(form: Readable, dim: int) -> float:
    """Return the bytes of a vector's codes and scale."""
    if isinstance(form, ScalarFormat) and form.numbers == "blocks":
        return dim / 32 * (2 + 4 * form.bits)
    if isinstance(form, ScalarFormat) and form.numbers == "groups":
        return dim / 32 * (4 + 4 * form.bits)
    how = code_options(form, usual_lookup(form), dim, 16)
    return how["BITS"] * dim / 32 + {"byte": 1, "half": 2, "none": 0}[how["LENGTH"]]


def all_ways(spec: str, dim: int) -> list[tuple[str, ...]]:
    """Return all pairs of lookups of a codec's keys and values; where only one has a lookup, the other has its default."""
    sides = forms(spec, dim)
    names = dict.fromkeys(way for form in sides for way in lookups(form))
    return list(dict.fromkeys(tuple(way if way in lookups(form) else usual_lookup(form) for form in sides) for way in names))


def row(spec: str, dim: int, rows: int, ways: Sequence[str]) -> dict[str, Any]:
    """Analyse one kernel."""
    kernel = built(spec, dim, rows, ways)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        loop = longest_loop(tool("nvdisasm", "-c", file.name))
    warps = kernel.metadata.num_warps
    coded = sum(BLOCK * row_bytes(form, dim) for form in forms(spec, dim))
    return {
        "spec": spec,
        "dim": dim,
        "rows": rows,
        "lookup": ", ".join(dict.fromkeys(ways)),
        "warps": warps,
        "registers": int(re.findall(r"REG:(\d+)", usage)[-1]),
        "spilled": int(re.findall(r"STACK:(\d+)", usage)[-1]),
        "shared": kernel.metadata.shared,
        "instructions": loop * warps * BLOCK // block_of(forms(spec, dim)[0])[0],
        "while dense is read": round(2 * BLOCK * dim * 2 / BYTES * ISSUES),
        "while codes are read": round(coded / BYTES * ISSUES),
    }


def main() -> int:
    """Compile, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    specs = tuple(dict.fromkeys(spec for spec, _, _ in CASES))
    parser.add_argument("--codecs", nargs="+", choices=specs, default=specs, metavar="CODEC", help="only these codecs")
    parser.add_argument("--lookups", nargs="+", metavar="NAME", help="only these ways to read a codec; default: all")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "triton_static.json")
    options_ = parser.parse_args()
    rows = []
    for spec, dim, count in (case for case in CASES if case[0] in options_.codecs):
        wanted = options_.lookups
        rows += [row(spec, dim, count, ways) for ways in all_ways(spec, dim) if wanted is None or set(ways) & set(wanted)]
    record = {"triton": compiler.__version__, "capability": CAPABILITY, "block": BLOCK, "rows": rows}
    write_json(options_.json, record)
    table = Table(*rows[0])
    for each in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else value for value in each.values()))
    Console().print(table)
    Console().print(f"Saved {options_.json}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
