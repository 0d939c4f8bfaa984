"""Tables and compile-time options of the Triton kernels: how formats are read, rotations, blocks of tokens."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, partial
from math import gcd
from typing import Any, Literal, TypeAlias, TypeGuard

import torch
from torch import Tensor

from tessera.devices import upload
from tessera.kernels.compressed_kv import Coded, CompressedKV, Format
from tessera.kernels.joint import JointFormat
from tessera.kernels.nearest import CellIndex, reduction_tables
from tessera.kernels.scalars import ScalarFormat
from tessera.quaternion import units

#: Largest head_dim that the kernels support.
MAX_DIM = 256
#: The formats that the kernels read, see `readable`.
Readable: TypeAlias = JointFormat | ScalarFormat
#: How a codeword of a joint codebook is looked up, and the size of the table for codes of 16 bits. "moves": a point, in 8 KiB,
#: whose components are then exchanged and negated. "held": the same, from shared memory. "signs": a point whose components have
#: been exchanged, in 64 KiB, which are then negated. "halves": the codeword itself, in 512 KiB.
LOOKUPS = ("moves", "held", "signs", "halves")
#: The same for the codes of `ScalarFormat`, by its `numbers`. "integers" and "floats" are made of the bits of a code. "curve":
#: a polynomial gives a level. "pairs": two levels are a word of a table, in 1 KiB for 4 bits. "held pairs": the same, from
#: shared memory.
SCALAR_LOOKUPS = {
    "uniform": ("integers",),
    "fp8": ("floats",),
    "blocks": ("blocks",),
    "groups": ("groups",),
    "levels": ("curve", "pairs", "held pairs"),
}
#: Maximum number of bits of levels that a polynomial gives, and the number of its coefficients by bits.
TERMS = {2: 2, 3: 4, 4: 5}
#: Tokens that share a scale and a low of a key channel.
SHARE = 32
#: Maximum number of points, or of pairs of levels, in shared memory.
HELD = 2048
#: Number of columns of the table of blocks, see `block_table`.
COLUMNS = 16
#: Role and names of the fields of the first columns; a format has at most one of the names.
FIELDS: tuple[tuple[Literal["key", "value"], tuple[str, ...]], ...] = (
    ("key", ("codes",)),
    ("key", ("scale",)),
    ("key", ("centre", "low")),
    ("key", ("exponent",)),  # the largest in a row of centres
    ("value", ("codes",)),
    ("value", ("scale",)),
    ("value", ("low",)),
)
#: The inverse of the value of 1 in the fraction of a half-precision number without an exponent.
FRACTION = 2.0**24


def power(n: int) -> int:
    """Round n up to a power of two, at least 16, as a dot product requires."""
    return max(16, 1 << (n - 1).bit_length())


def readable(form: object) -> TypeGuard[Readable]:
    """Whether the kernels read a format, for a head_dim that `dim_refusal` does not refuse."""
    return isinstance(form, JointFormat) or (isinstance(form, ScalarFormat) and form.numbers in SCALAR_LOOKUPS)


def shares_tokens(form: Format | None) -> bool:
    """Whether tokens of a key channel share a scale and a low."""
    return isinstance(form, ScalarFormat) and form.numbers == "groups"


def block_of(keys: Format) -> tuple[int, int]:
    """Return the tokens of a block of a kernel, and those that share centres or scales of key channels: a multiple."""
    from tessera.kernels.triton.attend_kernel import BLOCK

    if shares_tokens(keys):
        return SHARE, SHARE
    return BLOCK, keys.group if isinstance(keys, JointFormat) else BLOCK


def dim_refusal(forms: Iterable[Format | None], dim: int) -> str | None:
    """Say why the kernels cannot read vectors of `dim` numbers in readable formats, or return None."""
    if dim % 4 or dim > MAX_DIM:
        return f"head_dim {dim} is no multiple of 4 up to {MAX_DIM}"
    if dim % 32 and any(isinstance(form, ScalarFormat) and form.numbers == "blocks" for form in forms):
        return f"head_dim {dim} is no multiple of 32, the numbers of a block"
    return None


def lookups(form: Readable) -> tuple[str, ...]:
    """Return the ways to read the codes of a format."""
    if isinstance(form, JointFormat):
        return LOOKUPS
    return tuple(name for name in SCALAR_LOOKUPS[form.numbers] if name != "curve" or form.bits in TERMS)


def code_options(form: Readable, lookup: str, align: int) -> dict[str, Any]:
    """Return the compile-time options of a kernel that reads codes: BITS of a chunk of four numbers, and more.

    ALIGN is `align`, LOOKUP is `lookup`. FIELD: bits of a component of a point, or of a number. MOVE_BITS: those of a code that
    are the move. POINTS: rows of the table that is held, or coefficients of the polynomial. LENGTH: whether the length of a
    vector is a "byte", the index of a scale, or a "half"-precision number, or there is "none". ZERO: the code of 0 of uniform
    codes.

    Args:
        form: format of the codes.
        lookup: one of `lookups`.
        align: divides all addresses of codes and, of keys, centres.

    Raises:
        ValueError: if the format cannot be read in this way.
    """
    if lookup not in lookups(form):
        raise ValueError(f"no lookup {lookup!r}; there are {', '.join(lookups(form))}")
    found = {"ALIGN": align, "LOOKUP": lookup, "MOVE_BITS": 0, "ZERO": 0}
    if isinstance(form, JointFormat):
        points = 1 << (form.bits - form.move_bits)
        shape = {"BITS": form.bits, "MOVE_BITS": form.move_bits, "FIELD": _field(form), "POINTS": points, "LENGTH": "byte"}
        return {**found, **shape}
    zero = int(form.zero) if form.numbers == "uniform" else 0
    points = TERMS[form.bits] if lookup == "curve" else 1 << 2 * form.bits
    length = "half" if "scale" in form.fields["key"] else "none"
    return {**found, "BITS": 4 * form.bits, "FIELD": form.bits, "POINTS": points, "LENGTH": length, "ZERO": zero}


def step_of(form: Readable) -> float:
    """Return what the numbers that the kernels read are to be multiplied by, beside the lengths of their vectors."""
    if isinstance(form, JointFormat):
        return form.step * FRACTION
    return form.factor * {"uniform": FRACTION, "fp8": 256.0}.get(form.numbers, 1.0)


def options(dim: int, rows: int, keys: dict[str, Any], values: dict[str, Any], block: int) -> dict[str, Any]:
    """Return the compile-time options of `attend_kernel`, except those of visibility.

    Args:
        dim: head_dim of keys and values.
        rows: query rows of a program.
        keys, values: `code_options` of each.
        block: tokens of a block, see `block_of`.
    """
    from tessera.kernels.triton.attend_kernel import SLICE

    chunks = dim // 4
    return {
        "COLUMNS": COLUMNS,
        "CHUNKS": chunks,
        "WIDTH": power(chunks),
        "ROWS": rows,
        **keys,
        **{f"V_{name}": value for name, value in values.items()},
        "BLOCK": block,
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


def column_order(form: Readable, dim: int) -> list[int]:
    """Return the kernel's order of channels: numbers 0 and 1 of every chunk, then 2 and 3 of every chunk."""
    places = [(chunk, part + j) for part in (0, 2) for chunk in range(dim // 4) for j in (0, 1)]
    if isinstance(form, ScalarFormat) and form.numbers == "blocks" and form.bits == 4:
        # A byte holds two numbers that are 16 apart, and a chunk two bytes.
        return [chunk // 8 * 32 + chunk % 8 * 2 + j // 2 + j % 2 * 16 for chunk, j in places]
    return [4 * chunk + j for chunk, j in places]


@cache
def rotations(form: Readable, dim: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(dim, dim): x @ the first is the rotated x in the kernel's order of channels; the same in float16; x @ the third rotates
    values back, and lengthens them as they must be."""
    matrix = torch.eye(dim, dtype=torch.float32)
    if form.signs.numel():
        hadamard = torch.ones(1, 1, dtype=torch.float32)
        while len(hadamard) * len(form.dct) < dim:
            hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float32), hadamard) / 2**0.5
        matrix = (torch.kron(form.dct, hadamard) * form.signs).T
    matrix = matrix[:, column_order(form, dim)].contiguous().to(device)
    return matrix, matrix.half(), (matrix.T * form.value_gain).contiguous()


def _field(form: JointFormat) -> int:
    """Return the bits of a component of a point: a sign and seven, or more."""
    return 8 if form.points.abs().max() <= 127 else 16


def _fits(form: JointFormat) -> bool:
    """Whether the points fit in shared memory."""
    return _field(form) == 8 and 1 << (form.bits - form.move_bits) <= HELD


def usual_lookup(form: Readable) -> str:
    """Return the default lookup for a format: of those with a table, that from shared memory where it fits."""
    if isinstance(form, JointFormat):
        return "held" if _fits(form) else "moves"
    if form.numbers == "levels":
        return "held pairs" if 1 << 2 * form.bits <= HELD else "pairs"
    return lookups(form)[0]


@cache
def tables(form: Readable, lookup: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the table of a lookup, the moves, and the scales; those that a format has not have a single element.

    A move is the word of `_moves`. A point is four bytes in the order 0, 2, 1, 3 of its components, each a sign and seven bits,
    or, where these do not suffice and where nothing but signs is left to do, four half-precision numbers.
    """
    if isinstance(form, JointFormat):
        return _points(form, lookup).contiguous().to(device), _moves(form).to(device), form.scales.to(device)
    none = torch.zeros(1, dtype=torch.int32)
    table = none
    if lookup == "curve":
        table = curve(form.levels)
    elif form.numbers == "levels":
        low, high = (level.reshape(-1) for level in torch.meshgrid(form.levels, form.levels, indexing="xy"))
        table = torch.stack((low, high), dim=-1).half().view(torch.int32).squeeze(-1)
    return table.contiguous().to(device), none.to(device), none.float().to(device)


def curve(levels: Tensor) -> Tensor:
    """Coefficients of the odd polynomial that gives n levels, almost symmetrical about 0.

    Code c has the level x · p(x²), where x = (2 c + 1) / n - 1. Computed in half precision all are within 0.15 %.

    Args:
        levels: (n,) float32, ascending.

    Returns:
        (terms,) float16, those of p from the constant one on.
    """
    n = len(levels)
    x = (2 * torch.arange(n // 2, n, dtype=torch.float64) + 1) / n - 1
    wanted = (levels[n // 2 :] - levels[: n // 2].flip(0)).double() / 2
    # Each divided by its level: what counts is the relative error.
    powers = x[:, None] ** (2 * torch.arange(TERMS[n.bit_length() - 1]) + 1) / wanted[:, None]
    rest, found = torch.ones(len(x), 1, dtype=torch.float64), []
    for term in reversed(range(powers.shape[1])):
        # Rounded one by one, so that those that follow make up for the rounding.
        found.append(torch.linalg.lstsq(powers[:, : term + 1], rest).solution[-1].half())
        rest = rest - powers[:, term : term + 1] * found[-1].double()
    return torch.cat(found[::-1])


def _points(form: JointFormat, lookup: str) -> Tensor:
    """Return the table of a lookup of codewords."""
    # There is a row for every value of a code, zero where the codebook has none.
    points = torch.zeros(1 << (form.bits - form.move_bits), 4, dtype=torch.long)
    points[: len(form.points)] = form.points.long()
    if lookup == "held" and not _fits(form):
        raise ValueError(f"shared memory holds up to {HELD} points of bytes; a code of {form.bits} bits has {len(points)}")
    if lookup == "halves":
        return _pairs((points[:, form.permutation] * form.sign).flatten(0, 1))
    if lookup == "signs":
        places = torch.arange(4)
        return _pairs(points[:, places ^ places[:, None]].flatten(0, 1))
    if _field(form) > 8:
        return _pairs(points)
    bytes_ = points.abs() | (points < 0).long() << 7
    return (bytes_[:, [0, 2, 1, 3]] << torch.arange(4) * 8).sum(-1).to(torch.uint32).view(torch.int32)


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

    The first divisor is for key codes and centres. Columns: of a block's first token the addresses of `FIELDS`; in the same
    order the distances from one key head to the next in bytes; number of tokens; place of the first.

    Args:
        pages: keys and values.
        block: tokens of a block at most, see `block_of`.
        group: tokens that share key centres, or scales and lows of key channels.
    """
    if "triton" not in pages.memo:
        notes = pages.notes("triton", partial(_block_rows, block=block, group=group))
        table = torch.cat([rows for rows, _ in notes])
        blocks = torch.tensor([len(rows) for rows, _ in notes])
        table[:, -1] += torch.tensor(pages.starts[:-1]).repeat_interleave(blocks)
        columns = ([0, 2, 7, 9], [4, 11])
        aligns = (
            gcd(16, kept_fields(packed)["codes"].shape[-1], *table[:, which].flatten().tolist())
            for packed, which in zip(pages.pages[0], columns, strict=True)
        )
        pages.memo["triton"] = upload(table, pages.pages[0][0].device), *aligns
    return pages.memo["triton"]


def kept_fields(packed: Coded) -> dict[str, Tensor]:
    """Return the kept tensors by the names that kernels use."""
    form = packed.codec.kernel_format(packed.shape[3])
    assert form is not None
    names = form.fields[packed.role]  # type: ignore[index]
    return {name: packed.tensors[field] for name, field in names.items() if field in packed.tensors}


def _block_rows(keys: Coded, values: Coded, block: int, group: int) -> tuple[Tensor, list[Tensor | None]]:
    """Make one page's rows, places counted from its first token, and return the tensors that they point to, perhaps copies."""
    found = {"key": kept_fields(keys), "value": kept_fields(values)}
    if (centre := found["key"].get("centre")) is not None:
        found["key"]["exponent"] = (centre & 15).amax(-1, keepdim=True).byte()
    fields = [next((found[role][name] for name in names if name in found[role]), None) for role, names in FIELDS]
    shared = shares_tokens(keys.codec.kernel_format(keys.shape[3]))
    kept = [None if field is None else field.contiguous() for field in fields]
    strides = [0 if field is None else field.stride(1) * field.element_size() for field in kept]
    steps = [0 if field is None else field.stride(2) * field.element_size() for field in kept]
    rows, token = [], 0
    while token < keys.tokens:
        # A block never crosses from one group into the next.
        size = min(block, keys.tokens - token, block - (keys.offset + token) % block)
        at = (keys.offset + token) // group
        first = [token, at if shared else token, at, at, token, token, token]
        addresses = [0 if f is None else f.data_ptr() + n * step for f, n, step in zip(kept, first, steps, strict=True)]
        rows.append([*addresses, *strides, size, token])
        token += size
    return torch.tensor(rows, dtype=torch.int64).view(-1, COLUMNS), kept
