"""Tables and compile-time options of the Triton kernels: codewords, rotations, blocks of tokens."""

from __future__ import annotations

from functools import cache, partial
from math import gcd
from typing import Any

import torch
from torch import Tensor

from tessera.devices import upload
from tessera.kernels.compressed_kv import Coded, CompressedKV
from tessera.kernels.joint import JointFormat
from tessera.kernels.nearest import CellIndex, reduction_tables
from tessera.quaternion import units

#: How a codeword is looked up, and the size of the table for codes of 16 bits. "moves": a point, in 8 KiB, whose components are
#: then exchanged and negated. "held": the same, from shared memory. "signs": a point whose components have been exchanged, in
#: 64 KiB, which are then negated. "halves": the codeword itself, in 512 KiB.
LOOKUPS = ("moves", "held", "signs", "halves")
#: Maximum number of points in shared memory.
HELD = 2048
#: Number of columns of the table of blocks, see `block_table`.
COLUMNS = 14
#: The inverse of the value of 1 in the fraction of a half-precision number without an exponent.
FRACTION = 2.0**24


def power(n: int) -> int:
    """Round n up to a power of two, at least 16, as a dot product requires."""
    return max(16, 1 << (n - 1).bit_length())


def code_options(form: JointFormat, lookup: str, align: int) -> dict[str, Any]:
    """Return the compile-time options of a kernel that reads codes.

    Args:
        form: format of the codes.
        lookup: one of `LOOKUPS`.
        align: divides all addresses of codes and, of keys, centres.
    """
    return {
        "BITS": form.bits,
        "ALIGN": align,
        "LOOKUP": lookup,
        "MOVE_BITS": form.move_bits,
        "FIELD": _field(form),
        "POINTS": 1 << (form.bits - form.move_bits),
    }


def options(dim: int, rows: int, keys: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return the compile-time options of `attend_kernel`, except those of visibility.

    Args:
        dim: head_dim of keys and values.
        rows: query rows of a program.
        keys, values: `code_options` of each.
    """
    from tessera.kernels.triton.attend_kernel import BLOCK, SLICE

    chunks = dim // 4
    return {
        "COLUMNS": COLUMNS,
        "CHUNKS": chunks,
        "WIDTH": power(chunks),
        "ROWS": rows,
        **keys,
        **{f"V_{name}": value for name, value in values.items()},
        "BLOCK": BLOCK,
        "SLICE": SLICE,
        "num_warps": 8 if rows > 16 or dim > 128 else 4,
        "num_stages": 1,  # with more stages the tables are prefetched through shared memory, which they would fill
    }


@cache
def index_tables(index: CellIndex) -> tuple[Tensor, ...]:
    """Return the candidate lists and the group's tables in the form of the kernel, on the index's device."""
    device = index.roots.device
    first, count, points, codes = index.lists()
    group = [table.flatten().int() for table in reduction_tables()]
    return tuple(t.to(device).contiguous() for t in (first, count, points, codes, units(), *group))


@cache
def index_bounds(index: CellIndex) -> tuple[int, ...]:
    """Return the origin and the dims of the cubes as the kernel's numbers, read from the device once."""
    return (*index.origin.tolist(), *index.dims.tolist())


@cache
def index_bias(index: CellIndex) -> Tensor:
    """Return half the squared length of each codeword."""
    return index.words.square().sum(-1) / 2


def column_order(dim: int) -> list[int]:
    """Return the kernel's order of channels: components 0 and 1 of every chunk, then 2 and 3 of every chunk."""
    return [4 * chunk + part + j for part in (0, 2) for chunk in range(dim // 4) for j in (0, 1)]


@cache
def rotations(form: JointFormat, dim: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(dim, dim): x @ the first is the rotated x in the kernel's order of channels; the same in float16; x @ the third rotates
    values back, and lengthens them as they must be."""
    matrix = torch.eye(dim, dtype=torch.float32)
    if form.signs.numel():
        hadamard = torch.ones(1, 1, dtype=torch.float32)
        while len(hadamard) * len(form.dct) < dim:
            hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float32), hadamard) / 2**0.5
        matrix = (torch.kron(form.dct, hadamard) * form.signs).T
    matrix = matrix[:, column_order(dim)].contiguous().to(device)
    return matrix, matrix.half(), (matrix.T * form.value_gain).contiguous()


def _field(form: JointFormat) -> int:
    """Return the bits of a component of a point: a sign and seven, or more."""
    return 8 if form.points.abs().max() <= 127 else 16


def _fits(form: JointFormat) -> bool:
    """Whether the points fit in shared memory."""
    return _field(form) == 8 and 1 << (form.bits - form.move_bits) <= HELD


def usual_lookup(form: JointFormat) -> str:
    """Return the default lookup for a format."""
    return "held" if _fits(form) else "moves"


@cache
def tables(form: JointFormat, lookup: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the table of a lookup, the moves, and the scales.

    A move is the word of `_moves`. A point is four bytes in the order 0, 2, 1, 3 of its components, each a sign and seven bits,
    or, where these do not suffice and where nothing but signs is left to do, four half-precision numbers.
    """
    if lookup not in LOOKUPS:
        raise ValueError(f"no lookup {lookup!r}; there are {', '.join(LOOKUPS)}")
    # There is a row for every value of a code, zero where the codebook has none.
    points = torch.zeros(1 << (form.bits - form.move_bits), 4, dtype=torch.long)
    points[: len(form.points)] = form.points.long()
    if lookup == "held" and not _fits(form):
        raise ValueError(f"shared memory holds up to {HELD} points of bytes; a code of {form.bits} bits has {len(points)}")
    if lookup == "halves":
        table = _pairs((points[:, form.permutation] * form.sign).flatten(0, 1))
    elif lookup == "signs":
        places = torch.arange(4)
        table = _pairs(points[:, places ^ places[:, None]].flatten(0, 1))
    elif _field(form) > 8:
        table = _pairs(points)
    else:
        bytes_ = points.abs() | (points < 0).long() << 7
        table = (bytes_[:, [0, 2, 1, 3]] << torch.arange(4) * 8).sum(-1).to(torch.uint32).view(torch.int32)
    return table.contiguous().to(device), _moves(form).to(device), form.scales.to(device)


def _pairs(points: Tensor) -> Tensor:
    """Pack (n, 4) integers to (n,) int64 of four half-precision numbers integer / `FRACTION`, the first in the lowest bits."""
    return (points / FRACTION).half().view(torch.int64).squeeze(-1)


def _moves(form: JointFormat) -> Tensor:
    """A word for each move, int32: which of the exchanges x ^ a of components it is in bits 0 and 1, a & 2 in bit 3 once more;
    where it negates, the sign bits of the first pair's halves, and one lower those of the second's.
    """
    exchange = form.permutation[:, 0]
    if not torch.equal(form.permutation, torch.arange(4) ^ exchange[:, None]):
        raise ValueError("the kernel knows moves that exchange components by pairs alone")
    negated = (form.sign < 0).long()
    signs = (negated << torch.tensor([15, 31, 14, 30])).sum(-1)
    return (exchange | (exchange & 2) << 2 | signs).to(torch.uint32).view(torch.int32)


def block_table(pages: CompressedKV, block: int, group: int) -> tuple[Tensor, int, int]:
    """Return the table of blocks, (blocks, `COLUMNS`) int64, and divisors of the addresses of keys and of value codes.

    The first divisor is for key codes and centres. Columns: addresses of key codes, key scales, key centres, the largest
        exponents in these, value codes and value scales of
    its first token; in the same order the distances from one key head to the next in bytes; number of tokens; place of the
    first.
    """
    if "triton" not in pages.memo:
        notes = pages.notes("triton", partial(_block_rows, block=block, group=group))
        table = torch.cat([rows for rows, _ in notes])
        blocks = torch.tensor([len(rows) for rows, _ in notes])
        table[:, -1] += torch.tensor(pages.starts[:-1]).repeat_interleave(blocks)
        columns = ([0, 2, 6, 8], [4, 10])
        aligns = (
            gcd(16, packed.tensors["codes"].shape[-1], *table[:, which].flatten().tolist())
            for packed, which in zip(pages.pages[0], columns, strict=True)
        )
        pages.memo["triton"] = upload(table, pages.pages[0][0].device), *aligns
    return pages.memo["triton"]


def _block_rows(keys: Coded, values: Coded, block: int, group: int) -> tuple[Tensor, list[Tensor | None]]:
    """Make one page's rows, places counted from its first token, and return the tensors that they point to, perhaps copies."""
    centre = keys.tensors.get("centre")
    fields = [keys.tensors["codes"], keys.tensors["scale"], centre]
    fields += [None if centre is None else (centre & 15).amax(-1, keepdim=True).byte()]
    fields += [values.tensors["codes"], values.tensors["scale"]]
    kept = [None if field is None else field.contiguous() for field in fields]
    strides = [0 if field is None else field.stride(1) * field.element_size() for field in kept]
    steps = [0 if field is None else field.stride(2) * field.element_size() for field in kept]
    rows, token = [], 0
    while token < keys.tokens:
        # A block never crosses from one group into the next.
        size = min(block, keys.tokens - token, block - (keys.offset + token) % block)
        at = (keys.offset + token) // group
        first = [token, token, at, at, token, token]
        addresses = [0 if f is None else f.data_ptr() + n * step for f, n, step in zip(kept, first, steps, strict=True)]
        rows.append([*addresses, *strides, size, token])
        token += size
    return torch.tensor(rows, dtype=torch.int64).view(-1, COLUMNS), kept
