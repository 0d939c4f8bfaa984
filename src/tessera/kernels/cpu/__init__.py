"""C++ kernels for CPUs, built with the package where a compiler is present."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessera.kernels.compressed_kv import Coded, CompressedKV, Format, strided
from tessera.kernels.joint import JointFormat
from tessera.kernels.params import AttendParams
from tessera.kernels.products import ProductFormat
from tessera.kernels.reference import check_exact
from tessera.kernels.scalars import ScalarFormat

_cpu: Any
try:
    _cpu = import_module("tessera.kernels.cpu._cpu")
    MISSING = None
except ImportError as error:
    _cpu, MISSING = None, f"the C++ kernels are not built ({error}); reinstall where a C++ compiler is present"


def _share_threads() -> str | None:
    """Let the kernels run on the threads of torch's OpenMP runtime; returns its path, None if there is none.

    torch calls the runtime that its symbols were bound to: a preloaded one (LD_PRELOAD) comes before torch's own, and both are
        then mapped. A lookup in the whole process finds the same one.
    """
    try:
        lines = [line.split(None, 5) for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line]
    except OSError:
        return None
    spans = [([int(end, 16) for end in line[0].split("-")], line[-1].strip()) for line in lines]
    mapped = sorted({path for _, path in spans}, key=lambda path: ("torch" not in path, path))  # torch's own before others'
    path: str | None
    for path in (None, *mapped):
        if path is None or Path(path).name.startswith(("libgomp", "libiomp5", "libomp")):
            try:
                library = ctypes.CDLL(path)
                entries = [
                    ctypes.cast(entry, ctypes.c_void_p).value or 0
                    for entry in (library.GOMP_parallel, library.omp_get_thread_num)
                ]
            except (OSError, AttributeError):
                continue
            _cpu.use_openmp(*entries)
            return next((name for (low, high), name in spans if low <= entries[0] < high), path)
    return None


#: The OpenMP runtime whose threads the kernels use; None: the kernels have threads of their own.
OPENMP = None if _cpu is None else _share_threads()
#: Instruction sets, from the slowest to the fastest; NEON and the dot product of bytes are those of Arm processors.
LEVELS = ("portable", "neon", "dotprod", "avx2", "avxvnni", "avx512")
#: 8-bit limbs in which the kernels by hand write a query and a softmax weight: with two the relative error is 4e-5, far
#: below a codec's; with three it is that of float32 sums. Those for NEON and AVX2 use 16-bit numbers, so that one limb is
#: as exact as two.
LIMBS = 2
#: Largest head_dim that the kernels support.
MAX_DIM = 512
#: Number of query rows of a key head up to which `attend_exact` is used.
FEW_ROWS = 64


@cache
def levels() -> tuple[str, ...]:
    """List the instruction sets of this processor and this build, the fastest last; none if the kernels are not built."""
    return () if _cpu is None else tuple(_cpu.levels())


def float32_refusal(tensors: Iterable[Tensor | None]) -> str | None:
    """Say why a kernel that takes float32 on the CPU cannot be used, or return None if it can."""
    if MISSING is not None:
        return MISSING
    for x in tensors:
        if x is not None and (x.device.type != "cpu" or x.dtype != torch.float32):
            return f"the kernel takes float32 on the CPU, not {x.dtype} on {x.device}"
    return None


def tracked(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Detach the tensors where no graph is recorded, so that a kernel keeps nothing for backward."""
    return [x if x is None or torch.is_grad_enabled() else x.detach() for x in tensors]


def addresses(tensors: Iterable[Tensor | None]) -> list[int]:
    """Return the addresses of tensors for a kernel; 0 for None."""
    return [0 if x is None else x.data_ptr() for x in tensors]


def attend_refusal(q: Tensor, pages: CompressedKV) -> str | None:
    """Say why `attend` cannot be used, or return None if it can."""
    keys, _ = pages.pages[0]
    dim = pages.shape[3]
    if MISSING is not None:
        return MISSING
    if torch.is_grad_enabled() and q.requires_grad:
        return "the C++ kernels have no gradients"
    if q.device.type != "cpu" or keys.device.type != "cpu":
        return f"the queries are on {q.device} and the cache on {keys.device}"
    if (lacking := pages.lacking()) is not None:
        return f"there is no kernel for {lacking}"
    if dim % 4 or dim > MAX_DIM:
        return f"head_dim {dim} is no multiple of 4 up to {MAX_DIM}"
    return None


def attend(
    q: Tensor,
    pages: CompressedKV,
    params: AttendParams,
    *,
    level: str | None = None,
    limbs: int = LIMBS,
) -> tuple[Tensor, Tensor]:
    """`tessera.kernels.reference.attend` in C++.

    Args:
        q, pages, params: as there.
        level: instruction set; None: the best there is.
        limbs: 1, 2 or 3, see `LIMBS`; the portable form computes in float.
    """
    batch, heads, tokens, dim = q.shape
    key_form, value_form = pages.check(q, params)
    layer = pages.pages[0][0].layer
    rule, _kept = _rule(params)
    wide = _narrowed(widened(q), pages)
    out = torch.empty_like(wide)
    lse = wide.new_empty(batch, heads, tokens)
    if not q.numel():
        return out, lse
    _cpu.attend(
        book(key_form, pages.shape[1], layer),
        book(value_form, pages.shape[1], layer),
        table_of(pages),
        level or levels()[-1],
        wide.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        batch,
        heads,
        pages.shape[1],
        tokens,
        dim,
        params.scale,
        value_form.value_gain,
        *rule,
        limbs,
        torch.get_num_threads(),
    )
    return out, lse


def _rule(params: AttendParams) -> tuple[list[float], Tensor | None]:
    """Return the parameters after the scale in the form that the kernels read, and the mask that they point to."""
    mask, strides = strided(params.mask)
    start, window = params.start, params.window or 0
    pointer = 0 if mask is None else mask.data_ptr()
    return [params.softcap or 0.0, pointer, *strides, start is not None, start or 0, 0 if start is None else window], mask


def _narrowed(q: Tensor, pages: CompressedKV) -> Tensor:
    """`CompressedKV.narrowed` of contiguous float32 queries, without small, slow PyTorch operations."""
    if pages.stats is None:
        return q
    sizes, out = pages.stats.sizes.contiguous(), torch.empty_like(q)
    rows, heads, dim = sizes.shape
    queries = q.shape[1] // heads * q.shape[2]
    _cpu.narrow(q.data_ptr(), sizes.data_ptr(), pages.stats.table.data_ptr(), out.data_ptr(), rows * heads, queries, dim)
    return out


def widened(q: Tensor) -> Tensor:
    """Return queries in the form that the kernels read."""
    if q.requires_grad or q.dtype != torch.float32 or not q.is_contiguous():
        q = q.detach().to(torch.float32).contiguous()
    return q


def attend_exact_refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Say why `attend_exact` cannot or should not be used, or return None."""
    _, heads, tokens, dim = q.shape
    if MISSING is not None:
        return MISSING
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "the C++ kernels have no gradients"
    if {q.device.type, k.device.type, v.device.type} != {"cpu"}:
        return f"the queries are on {q.device} and the keys on {k.device}"
    if k.dtype != v.dtype or k.dtype not in (torch.float32, torch.bfloat16):
        return f"there is no kernel for keys in {k.dtype} and values in {v.dtype}"
    if k.shape != v.shape or k.stride(3) != 1 or v.stride(3) != 1 or dim > MAX_DIM:
        return "there is no kernel for such keys and values"
    if heads // max(1, k.shape[1]) * tokens > FEW_ROWS:
        return "matrix products are faster for so many queries"
    return None


def attend_exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    params: AttendParams,
    *,
    level: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`tessera.kernels.reference.attend_exact` in C++, for a few queries. `level`: see `attend`."""
    check_exact(q, k, v, params)
    batch, heads, tokens, dim = q.shape
    rule, _kept = _rule(params)
    wide = widened(q)
    out = torch.empty_like(wide)
    lse = wide.new_empty(batch, heads, tokens)
    if not q.numel():
        return out, lse
    _cpu.attend_exact(
        level or levels()[-1],
        wide.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        batch,
        heads,
        k.shape[1],
        tokens,
        dim,
        k.shape[2],
        params.scale,
        *rule,
        k.dtype == torch.bfloat16,
        *(word for x in (k, v) for word in (x.data_ptr(), *(x.stride(i) * x.element_size() for i in range(3)))),
        torch.get_num_threads(),
    )
    return out, lse


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """`tessera.kernels.reference.merge` in C++, for float32 results on the CPU."""
    parts = [(out.contiguous(), lse.contiguous()) for out, lse in parts]
    out, lse = torch.empty_like(parts[0][0]), torch.empty_like(parts[0][1])
    pointers = [[out.data_ptr() for out, _ in parts], [lse.data_ptr() for _, lse in parts]]
    _cpu.merge(*pointers, lse.numel(), out.shape[-1], out.data_ptr(), lse.data_ptr())
    return out, lse


def merge_refusal(parts: Sequence[tuple[Tensor, Tensor]]) -> str | None:
    """Say why `merge` cannot or need not be used, or return None."""
    if len(parts) == 1:
        return "one part is the whole already"
    tensors = [x for part in parts for x in part]
    if any(x.requires_grad for x in tensors):
        return "the C++ kernels have no gradients"
    return float32_refusal(tensors)


def decode_refusal(packed: Coded) -> str | None:
    """Say why `decode` cannot be used, or return None if it can."""
    dim = packed.shape[3]
    if MISSING is not None:
        return MISSING
    if packed.device.type != "cpu":
        return f"the codes are on {packed.device}"
    if packed.codec.kernel_format(dim) is None or dim % 4 or dim > MAX_DIM:
        return f"there is no kernel for {packed.codec.spec} of {dim} numbers"
    return None


def chunks_refusal(x: Tensor, *_: object) -> str | None:
    """Say why no kernel can take this tensor, whatever its dtype, or return None if one can."""
    return MISSING or (None if x.device.type == "cpu" else f"the chunks are on {x.device}")


def decode(packed: Coded, level: str | None = None) -> Tensor:
    """Decode packed vectors to (batch, heads, tokens, head_dim) float32."""
    batch, heads, _, dim = packed.shape
    form = packed.codec.kernel_format(dim)
    assert form is not None
    row, _kept = _row(packed, packed)
    out = torch.empty(packed.shape, dtype=torch.float32, device="cpu")
    _cpu.decode(
        book(form, heads, packed.layer),
        torch.tensor([row]).numpy(),
        level or levels()[-1],
        packed.role == "value",
        form.value_gain if packed.role == "value" else 1.0,
        batch,
        heads,
        dim,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def nearest_directions(chunks: Tensor, rotations: Tensor) -> tuple[Tensor, Tensor]:
    """`tessera.kernels.directions` in C++."""
    batch, heads, tokens, n, _ = chunks.shape
    chunks, rotations = chunks.float().contiguous(), rotations.contiguous()
    codes = torch.empty(chunks.shape[:-1], dtype=torch.int32, device="cpu")
    projections = torch.empty(chunks.shape[:-1], dtype=torch.float32, device="cpu")
    where = (codes.data_ptr(), projections.data_ptr(), torch.get_num_threads())
    given = (rotations.data_ptr(), len(rotations), rotations.shape[1])
    _cpu.nearest_directions(*given, chunks.data_ptr(), batch * heads, tokens * n, *where)
    return codes, projections


def book(form: Format, heads: int, layer: int) -> Any:
    """Return a codec's tables in the form of the kernels, made once."""
    if isinstance(form, JointFormat):
        return _joint(form)
    return _scalars(form) if isinstance(form, ScalarFormat) else _products(form, heads, layer)


@cache
def _joint(form: JointFormat) -> Any:
    tables = (form.representatives, form.permutation, form.sign, form.scales, form.dct, form.signs)
    return _cpu.Book(form.bits, form.permutation_bits, form.step, *(table.contiguous().numpy() for table in tables))


@cache
def _scalars(form: ScalarFormat) -> Any:
    tables = (form.levels, form.dct, form.signs)
    return _cpu.Scalars(form.number, form.bits, form.zero, form.factor, *(table.contiguous().numpy() for table in tables))


@lru_cache(maxsize=256)  # a layer each
def _products(form: ProductFormat, heads: int, layer: int) -> Any:
    keys, values = form.directions(heads, "key", layer), form.directions(heads, "value", layer)
    tables = (form.levels, keys, values, form.dct, form.signs)
    return _cpu.Products(form.bits, form.radius_bits, *(table.contiguous().numpy() for table in tables))


def table_of(pages: CompressedKV) -> Any:
    """Return the addresses of each page's tensors in the form that `page_at` in module.cpp reads: (pages, 24) int64."""
    if "cpu" not in pages.memo:
        pages.memo["cpu"] = np.array([row for row, _ in pages.notes("cpu", _row)], dtype=np.int64)
    return pages.memo["cpu"]


def _row(keys: Coded, values: Coded) -> tuple[list[int], list[Tensor | None]]:
    """Return one page's row, and the tensors that it points to, some of which may be copies made by `_plain`."""
    row: list[int] = []
    held: list[Tensor | None] = []
    for packed in (keys, values):
        form = packed.codec.kernel_format(packed.shape[3])
        assert form is not None
        names = form.fields["key" if packed.role == "key" else "value"]
        for what in ("codes", "scale", "centre", "low", "flags"):
            field = packed.tensors.get(names.get(what, ""))
            held.append(None if field is None else _plain(field))
            row += [0, 0] if held[-1] is None else [held[-1].data_ptr(), held[-1].stride(1) * held[-1].element_size()]
        kept = packed.tensors.get(names.get("kept", ""))
        held.append(None if kept is None else kept.contiguous())
        row.append(0 if held[-1] is None else held[-1].data_ptr())
    return [*row, keys.tokens, keys.offset], held


def _plain(field: Tensor) -> Tensor:
    """Return the field with the kernel's strides: rows of a head contiguous, batch rows kv_heads heads apart."""
    if field.ndim > 4:
        field = field.flatten(3)
    _, heads, rows, width = field.shape if field.ndim == 4 else (*field.shape, 1)
    packed = field.stride(2) == width and (field.ndim == 3 or field.stride(3) == 1)
    if (packed or rows <= 1) and (field.shape[0] == 1 or field.stride(0) == heads * field.stride(1)):
        return field
    # For a single head `contiguous` does not change the stride.
    return field.new_empty(field.shape).copy_(field)
