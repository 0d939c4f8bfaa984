"""How the Triton kernels read formats of codes: which there are, and the compile-time options of the kernels for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias, TypeGuard

from tessera.kernels.compressed_kv import Format
from tessera.kernels.joint import JointFormat
from tessera.kernels.scalars import ScalarFormat
from tessera.kernels.triton.block_table import COLUMNS

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
#: Maximum number of points, or of pairs of levels, in shared memory.
HELD = 2048
#: The inverse of the value of 1 in the fraction of a half-precision number without an exponent.
FRACTION = 2.0**24


def power(n: int) -> int:
    """Round n up to a power of two, at least 16, as a dot product requires."""
    return max(16, 1 << (n - 1).bit_length())


def readable(form: object) -> TypeGuard[Readable]:
    """Whether the kernels read a format, for a head_dim that `dim_refusal` does not refuse."""
    return isinstance(form, JointFormat) or (isinstance(form, ScalarFormat) and form.numbers in SCALAR_LOOKUPS)


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


def whole_words(form: Readable, lookup: str, dim: int) -> bool:
    """Whether the codes of single numbers are read as words of 32 bits, which they must fill."""
    fits = isinstance(form, ScalarFormat) and form.bits in (2, 4, 8) and dim * form.bits % 32 == 0
    return fits and lookup not in ("pairs", "held pairs")


def code_options(form: Readable, lookup: str, dim: int, align: int) -> dict[str, Any]:
    """Return the compile-time options of a kernel that reads codes: BITS of a chunk of four numbers, and more.

    ALIGN is `align`, LOOKUP is `lookup`. FIELD: bits of a component of a point, or of a number. MOVE_BITS: those of a code that
    are the move. POINTS: rows of the table that is held, or coefficients of the polynomial. LENGTH: whether the length of a
    vector is a "byte", the index of a scale, or a "half"-precision number, or there is "none". WORDS: see `whole_words`. ZERO:
    the code of 0 of uniform codes.

    Args:
        form: format of the codes.
        lookup: one of `lookups`.
        dim: numbers of a vector.
        align: divides all addresses of codes and, of keys, centres.

    Raises:
        ValueError: if the format cannot be read in this way.
    """
    if lookup not in lookups(form):
        raise ValueError(f"no lookup {lookup!r}; there are {', '.join(lookups(form))}")
    found = {"ALIGN": align, "LOOKUP": lookup, "MOVE_BITS": 0, "WORDS": whole_words(form, lookup, dim), "ZERO": 0}
    if isinstance(form, JointFormat):
        points = 1 << (form.bits - form.permutation_bits)
        shape = {
            "BITS": form.bits,
            "MOVE_BITS": form.permutation_bits,
            "FIELD": point_bits(form),
            "POINTS": points,
            "LENGTH": "byte",
        }
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


def point_bits(form: JointFormat) -> int:
    """Return the bits of a component of a point: a sign and seven, or more."""
    return 8 if form.representatives.abs().max() <= 127 else 16


def fits_shared_memory(form: JointFormat) -> bool:
    """Whether the points fit in shared memory."""
    return point_bits(form) == 8 and 1 << (form.bits - form.permutation_bits) <= HELD


def usual_lookup(form: Readable) -> str:
    """Return the default lookup for a format: of those with a table, that from shared memory where it fits."""
    if isinstance(form, JointFormat):
        return "held" if fits_shared_memory(form) else "moves"
    if form.numbers == "levels":
        return "held pairs" if 1 << 2 * form.bits <= HELD else "pairs"
    return lookups(form)[0]
