"""What the Triton attention compiles to for a GPU, found out without one.

For each way to look a codeword up: registers of a thread, bytes that it spills into memory, shared memory of a program, and the
machine instructions that it takes to go through a block of 64 tokens of one key head, those of all its warps together. What
only groups with narrowed channels need is counted too.

Beside them stands what a multiprocessor could issue in the time in which its share of the memory's bandwidth delivers these
keys and values in float16, and as they are coded: more instructions than the first cannot be faster than dense attention,
fewer than the second leave the memory as the bound. The figures are an H200's, 4.8 TB/s, 132 multiprocessors that issue 4
instructions a cycle at 1.75 GHz, and nothing but arithmetic: it says what cannot be fast, not what is.

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
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled

import triton as compiler
from triton.backends.compiler import GPUTarget

from tessera import codecs
from tessera.codecs import Role
from tessera.codecs.hqmq_joint import JointHQMQ
from tessera.files import write_json
from tessera.kernels.joint import JointFormat
from tessera.kernels.triton.attend_kernel import BLOCK, attend_kernel
from tessera.kernels.triton.tables import LOOKUPS, code_options, options

ROOT = Path(__file__).resolve().parent.parent
#: Compute capability, and of a multiprocessor: bytes of memory in a nanosecond, instructions in a nanosecond.
CAPABILITY, BYTES, ISSUES = 90, 4800 / 132, 4 * 1.75
POINTERS = {
    "turned": "fp16",
    "rotation": "fp16",
    "blocks": "i64",
    "moves": "i32",
    "v_moves": "i32",
    "mask": "u8",
    **dict.fromkeys(("q", "unit", "scales", "v_scales", "out", "lse"), "fp32"),
}
FLAGS = {"MASKED": False, "PLACED": True, "WINDOWED": False, "CAPPED": False}
#: Codec, head_dim, rows of queries.
CASES = (
    ("hqmq:4", 128, 16),
    ("hqmq:4", 128, 32),
    ("hqmq:4", 64, 16),
    ("hqmq:4", 256, 16),
    ("hqmq:3", 128, 16),
    ("hqmq:k4v3", 128, 16),
)
ROLES: tuple[Role, ...] = ("key", "value")


def tool(name: str, *arguments: str) -> str:
    """What a program of NVIDIA's that comes with Triton prints."""
    program = Path(compiler.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, check=True).stdout


def forms(spec: str, dim: int) -> list[JointFormat]:
    """Of keys and of values."""
    sides = [codecs.get(spec).side(role) for role in ROLES]
    assert all(isinstance(side, JointHQMQ) for side in sides)
    return [side.kernel_format(dim) for side in sides]  # type: ignore[misc]


def built(spec: str, dim: int, rows: int, lookup: str) -> Any:
    """The compiled kernel."""
    keys, values = forms(spec, dim)
    codes, value_codes = code_options(keys, lookup, 16), code_options(values, lookup, 16)
    fixed = {**options(dim, rows, codes, value_codes), **FLAGS, "APART": values is not keys, "CENTRED": True}
    how = {name: fixed.pop(name) for name in ("num_warps", "num_stages")}
    pointers = dict(POINTERS)
    for name, field in (("table", "FIELD"), ("v_table", "V_FIELD")):
        pointers[name] = "i64" if lookup in ("signs", "halves") or fixed[field] > 8 else "i32"
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
    """Instructions of the longest loop in a disassembly."""
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


def row(spec: str, dim: int, rows: int, lookup: str) -> dict[str, Any]:
    """One kernel."""
    kernel = built(spec, dim, rows, lookup)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        loop = longest_loop(tool("nvdisasm", "-c", file.name))
    warps = kernel.metadata.num_warps
    coded = sum(BLOCK * (dim * form.bits / 4 / 8 + 1) for form in forms(spec, dim))
    return {
        "spec": spec,
        "dim": dim,
        "rows": rows,
        "lookup": lookup,
        "warps": warps,
        "registers": int(re.findall(r"REG:(\d+)", usage)[-1]),
        "spilled": int(re.findall(r"STACK:(\d+)", usage)[-1]),
        "shared": kernel.metadata.shared,
        "instructions": loop * warps,
        "while dense is read": round(2 * BLOCK * dim * 2 / BYTES * ISSUES),
        "while codes are read": round(coded / BYTES * ISSUES),
    }


def main() -> int:
    """Compile, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=len(CASES), help="so many of the cases")
    parser.add_argument("--lookups", nargs="+", choices=LOOKUPS, default=LOOKUPS)
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "triton_static.json")
    options_ = parser.parse_args()
    rows = []
    for spec, dim, count in CASES[: options_.cases]:
        rows += [row(spec, dim, count, lookup) for lookup in options_.lookups]
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
