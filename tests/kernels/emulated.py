"""Run the C++ kernels for another processor in an emulator, cross-compiled and without Python."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tessera.kernels import AttendParams, CompressedKV
from tessera.kernels.compressed_kv import Coded
from tessera.kernels.joint import JointFormat
from tessera.kernels.nearest import Codewords, reduction_tables

HERE = Path(__file__).parent
CPU = HERE.parents[1] / "src/tessera/kernels/cpu"
COMPILER, DISASSEMBLER, EMULATOR = "aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump", "qemu-aarch64"
#: Sources and flags as in CMakeLists.txt, for Arm.
FLAGS = "-std=c++17 -O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wall -Wextra -Werror -Wno-psabi -DTESSERA_NEON"
SOURCES = (
    "attend_portable",
    "attend_neon",
    "attend_dotprod",
    "nearest_portable",
    "nearest_index",
    "vector_codes",
    "threads",
    "memory",
)


def missing() -> str | None:
    """Say why the emulator cannot be used, or return None."""
    lacking = [name for name in (COMPILER, DISASSEMBLER, EMULATOR) if shutil.which(name) is None]
    return f"{' and '.join(lacking)} not found: Debian has g++-aarch64-linux-gnu and qemu-user" if lacking else None


@dataclass
class Kernels:
    """The compiled run_kernels.cpp in a directory."""

    directory: Path
    numbers: count[int] = field(default_factory=count)

    def build(self) -> None:
        """Compile it. Raises: RuntimeError with the compiler's output."""
        files = [str(CPU / f"{name}.cpp") for name in SOURCES]
        command = [COMPILER, *FLAGS.split(), "-static", "-pthread", f"-I{CPU}", *files, str(HERE / "run_kernels.cpp")]
        done = subprocess.run([*command, "-o", str(self.program)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)

    @property
    def program(self) -> Path:
        return self.directory / "run_kernels"

    def levels(self, processor: str = "max") -> list[str]:
        """Return the levels that the program finds on an emulated processor."""
        return subprocess.run([EMULATOR, "-cpu", processor, str(self.program)], capture_output=True, text=True).stdout.split()

    def uses(self, function: str, instruction: str) -> bool:
        """Whether a function whose name contains this uses the instruction on whole registers."""
        lines = subprocess.run([DISASSEMBLER, "-dC", str(self.program)], capture_output=True, text=True, check=True).stdout
        inside = False
        for line in lines.splitlines():
            inside = function in line if line.endswith(">:") else inside
            if inside and line.split("\t")[2:3] == [instruction] and re.search(r"v\d+\.(4s|16b)", line):
                return True
        return False

    def attend(self, q: Tensor, pages: CompressedKV, params: AttendParams, level: str, limbs: int = 3) -> tuple[Tensor, Tensor]:
        """Compute `tessera.kernels.cpu.attend`."""
        batch, heads, tokens, dim = q.shape
        forms = pages.check(q, params)
        placed, window = params.start is not None, params.window or 0
        ints = [batch, heads, pages.shape[1], tokens, dim, len(pages.pages), placed, params.start or 0, window, limbs, 1]
        arrays = [_ints(ints), _floats([params.scale, forms[1].value_gain, params.softcap or 0.0])]
        for form in forms:
            assert isinstance(form, JointFormat)
            arrays += [_ints([form.bits, form.permutation_bits]), _floats([form.step])]
            arrays += [form.representatives, form.permutation, form.sign, form.scales, form.dct, form.signs]
        mask = None if params.mask is None else params.mask.expand(batch, heads, tokens, pages.tokens)
        arrays += [q, torch.zeros(0) if mask is None else mask]
        for keys, values in pages.pages:
            arrays += [_ints([keys.tokens, keys.offset]), *_side(keys), *_side(values)]
        out, lse = self._solve("attend", level, arrays)
        return out.view(torch.float32).view(q.shape), lse.view(torch.float32).view(q.shape[:3])

    def encode(self, x: Tensor, vectors: Tensor, scale: Tensor, book: Codewords, bits: int, level: str) -> tuple[Tensor, ...]:
        """Return the codes and codewords of chunks x, (n, 4), and the packed codes of `vectors`, (m, d), divided by `scale`,
        (m,)."""
        arrays = [_ints([book.conjugations]), _floats([book.step]), book.products, book.codes.int(), *reduction_tables(), x]
        arrays += [_ints([vectors.shape[1], bits]), vectors, scale]
        codes, words, packed = self._solve("encode", level, arrays)
        return codes.view(torch.int32), words.view(torch.float32).view(-1, 4), packed.view(len(vectors), -1)

    def _solve(self, what: str, level: str, arrays: list[Tensor]) -> list[Tensor]:
        problem, result = (self.directory / f"{name}{next(self.numbers)}" for name in ("problem", "result"))
        with problem.open("wb") as file:
            for data in (what.encode() + b"\0", *(array.contiguous().numpy().tobytes() for array in arrays)):
                file.write(len(data).to_bytes(8, "little") + data)
        self._run(level, str(problem), str(result))
        rest, found = result.read_bytes(), []
        while rest:
            size = int.from_bytes(rest[:8], "little")
            found.append(torch.from_numpy(np.frombuffer(rest[8 : 8 + size], np.uint8).copy()))
            rest = rest[8 + size :]
        return found

    def _run(self, *words: str) -> str:
        done = subprocess.run([EMULATOR, str(self.program), *words], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr or done.returncode}")
        return done.stdout


def _ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _floats(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def _side(packed: Coded) -> list[Tensor]:
    return [packed.tensors.get(name, torch.zeros(0)) for name in ("codes", "scale", "centre")]
