"""The table of blocks of tokens that the Triton attention goes through: addresses of their codes, scales and centres."""

from __future__ import annotations

from functools import partial
from math import gcd
from typing import Literal

import torch
from torch import Tensor

from tessera.devices import upload
from tessera.kernels.compressed_kv import Coded, CompressedKV, Format
from tessera.kernels.joint import JointFormat
from tessera.kernels.scalars import ScalarFormat

#: Tokens that share a scale and a low of a key channel.
SHARE = 32
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


def shares_tokens(form: Format | None) -> bool:
    """Whether tokens of a key channel share a scale and a low."""
    return isinstance(form, ScalarFormat) and form.numbers == "groups"


def block_of(keys: Format) -> tuple[int, int]:
    """Return the tokens of a block of a kernel, and those that share centres or scales of key channels: a multiple."""
    from tessera.kernels.triton.attend_kernel import BLOCK

    if shares_tokens(keys):
        return SHARE, SHARE
    return BLOCK, keys.group if isinstance(keys, JointFormat) else BLOCK


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
