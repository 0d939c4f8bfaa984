"""Triton kernels for GPUs. Triton is imported when one of them first runs."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from math import gcd
from typing import Any

import torch
from torch import Tensor

from tessera.kernels.joint import JointFormat
from tessera.kernels.nearest import ROOT, CellIndex, brute_force, reduction_tables
from tessera.kernels.pages import Coded, Pages, strided
from tessera.quaternion import units

#: Longest head that the kernels know.
MAX_DIM = 256
#: Query rows of a program at most, by whether head_dim is over 128; more are split among programs. What these need stays in
#: registers, and Triton 3.6 fails to compile 64.
ROWS = {False: 32, True: 16}
#: How a codeword is looked up, and the size of the table for codes of 16 bits. "moves": a point, in 8 KiB, whose components are
#: then exchanged and negated. "held": the same, from shared memory. "signs": a point whose components have been exchanged, in
#: 64 KiB, which are then negated. "halves": the codeword itself, in 512 KiB.
LOOKUPS = ("moves", "held", "signs", "halves")
#: Most points that shared memory shall hold.
HELD = 2048
#: Of a row of the table of blocks, see `_block_table`.
COLUMNS = 14
#: What a kernel's integers are worth, as fractions of half-precision numbers without an exponent.
FRACTION = 2.0**24
#: Programs that are wanted at least, for each multiprocessor.
WAVES = 4


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing() -> str | None:
    """Why there are no Triton kernels here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'tessera[gpu]'"
    if not torch.cuda.is_available() and not interpreted():
        return "there is no CUDA device"
    return None


def _on(device: torch.device) -> AbstractContextManager[None]:
    """Triton launches on the current device: this makes the tensors' own the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def attend_refusal(q: Tensor, pages: Pages) -> str | None:
    """Why `attend` cannot be used, or None if it can."""
    keys, _ = pages.pages[0]
    dim = pages.shape[3]
    if missing() is not None:
        return missing()
    if torch.is_grad_enabled() and q.requires_grad:
        return "the Triton kernels have no gradients"
    if not interpreted() and not (q.is_cuda and keys.device == q.device):
        return f"the queries are on {q.device} and the cache on {keys.device}"
    if not isinstance(pages.form(), JointFormat):
        return f"there is no Triton kernel for {keys.codec.spec}"
    if dim % 4 or dim > MAX_DIM:
        return f"head_dim {dim} is no multiple of 4 up to {MAX_DIM}"
    return None


def attend(
    q: Tensor,
    pages: Pages,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    *,
    start: int | None = None,
    window: int | None = None,
    splits: int | None = None,
    lookup: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`tessera.kernels.reference.attend` in Triton.

    Args:
        q, pages, scale, mask, softcap, start, window: as there.
        splits: parts that the tokens are cut into; None: as many as keep the device busy.
        lookup: one of `LOOKUPS`; None: "held" where shared memory holds the points, else "moves".
    """
    from tessera.kernels.triton.attend_kernel import BLOCK, attend_kernel

    form = pages.check(q, mask)
    if not isinstance(form, JointFormat):
        raise ValueError(f"there is no Triton kernel for {pages.pages[0][0].codec.spec}")
    batch, heads, tokens, dim = q.shape
    kv_heads = pages.shape[1]
    group, lines = heads // kv_heads, batch * kv_heads
    rows = group * tokens
    rotation, halved, back = _rotations(form, dim, q.device)
    query, turned, unit = _prepared(q, scale, rotation)
    blocks, align = _block_table(pages, BLOCK, form.group)
    if len(blocks) == 0:
        return torch.zeros(q.shape, device=q.device), torch.full(q.shape[:-1], -torch.inf, device=q.device)
    lookup = lookup or _lookup(form)
    table, moves, scales = _tables(form, lookup, q.device)

    tile = min(ROWS[dim > 128], _power(rows))
    tiles = -(-rows // tile)
    if splits is None:
        wanted = WAVES * torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 2
        splits = max(1, min(-(-len(blocks) // 2), -(-wanted // (lines * tiles))))
    per_split = -(-len(blocks) // splits)
    splits = -(-len(blocks) // per_split)
    out = torch.empty((splits, lines, rows, dim), device=q.device, dtype=torch.float32)
    lse = torch.empty((splits, lines, rows), device=q.device, dtype=torch.float32)
    mask, strides = strided(mask)
    with _on(q.device):
        attend_kernel[(lines, splits, tiles)](
            query,
            turned,
            unit,
            halved,
            blocks,
            table,
            moves,
            scales,
            query if mask is None else mask.view(torch.uint8),
            out,
            lse,
            *strides,
            form.step * FRACTION,
            softcap or 0.0,
            start or 0,
            window or 0,
            len(blocks),
            per_split,
            lines,
            kv_heads,
            group,
            rows,
            tokens,
            **options(form, dim, tile, lookup, align),
            CENTRED="centre" in pages.pages[0][0].tensors,
            MASKED=mask is not None,
            PLACED=start is not None,
            WINDOWED=start is not None and window is not None,
            CAPPED=bool(softcap),
        )
    whole, total = _joined(out.view(splits, -1, dim), lse.view(splits, -1))
    return (whole @ back).view(batch, heads, tokens, dim), total.view(batch, heads, tokens)


def _prepared(q: Tensor, scale: float, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first three arguments of the kernel, each a row of a head after the other."""
    from tessera.kernels.triton.prepare_kernel import SLICE, TILE, prepare_kernel

    dim, rows = q.shape[-1], q.numel() // q.shape[-1]
    query = torch.empty((rows, dim), device=q.device, dtype=torch.float32)
    turned, unit = torch.empty_like(query, dtype=torch.float16), query.new_empty(rows)
    with _on(q.device):
        prepare_kernel[(-(-rows // TILE),)](
            q.detach().contiguous(),
            rotation,
            query,
            turned,
            unit,
            scale,
            rows,
            DIM=dim,
            WIDTH=_power(dim),
            TILE=TILE,
            SLICE=SLICE,
        )
    return query, turned, unit


def _joined(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax over all splits: (splits, rows, dim) and (splits, rows) -> (rows, dim) and (rows,)."""
    from tessera.kernels.triton.join_kernel import TOGETHER, join_kernel

    splits, rows, dim = out.shape
    if splits == 1:
        return out[0], lse[0]
    whole, total = torch.empty_like(out[0]), torch.empty_like(lse[0])
    with _on(out.device):
        join_kernel[(rows,)](
            out,
            lse,
            whole,
            total,
            splits,
            rows,
            DIM=dim,
            WIDTH=_power(dim),
            SPLITS=_power(splits),
            TOGETHER=TOGETHER,
        )
    return whole, total


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """`tessera.kernels.reference.merge` in Triton, for float32 results on the device."""
    shape = parts[0][0].shape
    out = torch.stack([out for out, _ in parts]).view(len(parts), -1, shape[-1])
    lse = torch.stack([lse for _, lse in parts]).view(len(parts), -1)
    if lse.shape[1] == 0:
        return parts[0]
    whole, total = _joined(out, lse)
    return whole.view(shape), total.view(shape[:-1])


def decode(packed: Coded) -> Tensor | None:
    """What the vectors stand for, (batch, heads, tokens, head_dim) float32; None where there is no kernel for them."""
    from tessera.kernels.triton.attend_kernel import BLOCK
    from tessera.kernels.triton.decode_kernel import decode_kernel

    batch, heads, tokens, dim = packed.shape
    form = packed.codec.kernel_format(dim)
    if not isinstance(form, JointFormat) or dim % 4 or dim > MAX_DIM:
        return None
    codes, scale = packed.tensors["codes"].contiguous(), packed.tensors["scale"].contiguous()
    out = torch.empty(packed.shape, dtype=torch.float32, device=codes.device)
    if out.numel():
        lookup = _lookup(form)
        table, moves, scales = _tables(form, lookup, codes.device)
        align = gcd(16, codes.shape[-1], codes.data_ptr())
        compiled = options(form, dim, 16, lookup, align)
        kept = ("CHUNKS", "WIDTH", "BITS", "ALIGN", "LOOKUP", "MOVE_BITS", "FIELD", "POINTS", "BLOCK")
        with _on(codes.device):
            decode_kernel[(batch * heads, -(-tokens // BLOCK))](
                codes,
                scale,
                table,
                moves,
                scales,
                out,
                tokens * codes.shape[-1],
                tokens,
                form.step * FRACTION,
                tokens,
                **{name: compiled[name] for name in kept},
            )
    out = out @ _rotations(form, dim, codes.device)[2]
    if packed.role == "key":
        out = out / form.value_gain
        if "centre" in packed.tensors:
            group = (packed.offset + torch.arange(tokens, device=codes.device)) // form.group
            words = packed.tensors["centre"][:, :, group]
            out = out * torch.exp2((words & 15).float()) + (words & -16).view(torch.float16).float()
    return out


def _power(n: int) -> int:
    """The power of two not less than n, 16 at least, which is what a dot product takes."""
    return max(16, 1 << (n - 1).bit_length())


def options(form: JointFormat, dim: int, rows: int, lookup: str, align: int) -> dict[str, Any]:
    """What `attend_kernel` is compiled for, and how, but for what is seen.

    Args:
        form, dim: of keys and values.
        rows: of a program.
        lookup: one of `LOOKUPS`.
        align: divides all addresses of codes and centres.
    """
    from tessera.kernels.triton.attend_kernel import BLOCK, SLICE

    chunks = dim // 4
    return {
        "COLUMNS": COLUMNS,
        "CHUNKS": chunks,
        "WIDTH": _power(chunks),
        "ROWS": rows,
        "BITS": form.bits,
        "ALIGN": align,
        "LOOKUP": lookup,
        "MOVE_BITS": form.move_bits,
        "FIELD": _field(form),
        "POINTS": 1 << (form.bits - form.move_bits),
        "BLOCK": BLOCK,
        "SLICE": SLICE,
        "num_warps": 8 if rows > 16 or dim > 128 else 4,
        "num_stages": 1,  # with more, what is looked up is brought in ahead by way of shared memory, which it fills
    }


def nearest(x: Tensor, index: CellIndex) -> Tensor:
    """`tessera.kernels.nearest.nearest` in Triton: (n, 4) float32 -> (n,) int64, rows of the index's words."""
    from tessera.kernels.triton.nearest_kernel import BLOCK, nearest_kernel

    x = x.contiguous()
    found = torch.empty(len(x), dtype=torch.int32, device=x.device)
    if len(x) == 0:
        return found.long()
    tables = _index_tables(index)
    with _on(x.device):
        nearest_kernel[(-(-len(x) // BLOCK),)](
            x,
            index.roots,
            index.children,
            *tables,
            found,
            len(x),
            ROOT,
            index.radius**2,
            *index.origin.tolist(),
            *index.dims.tolist(),
            DEPTH=index.depth,
            CONJUGATIONS=index.conjugations,
            BLOCK=BLOCK,
        )
    code = found.long()
    far = code < 0
    if far.any():
        code[far] = brute_force(x[far], index.words)
    return code


@cache
def _index_tables(index: CellIndex) -> tuple[Tensor, ...]:
    """Lists and the group, as the kernel reads them, on the index's device."""
    device = index.roots.device
    first, count, points, codes = index.lists()
    group = [table.flatten().int() for table in reduction_tables()]
    return tuple(t.to(device).contiguous() for t in (first, count, points, codes, units(), *group))


def column_order(dim: int) -> list[int]:
    """The kernel's order of channels: components 0 and 1 of every chunk, then 2 and 3 of every chunk."""
    return [4 * chunk + part + j for part in (0, 2) for chunk in range(dim // 4) for j in (0, 1)]


@cache
def _rotations(form: JointFormat, dim: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(dim, dim): x @ the first is the rotated x in the kernel's order of channels; the same in float16; x @ the third rotates
    values back, and lengthens them as they must be."""
    matrix = torch.eye(dim)
    if form.signs.numel():
        hadamard = torch.ones(1, 1)
        while len(hadamard) * len(form.dct) < dim:
            hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard) / 2**0.5
        matrix = (torch.kron(form.dct, hadamard) * form.signs).T
    matrix = matrix[:, column_order(dim)].contiguous().to(device)
    return matrix, matrix.half(), (matrix.T * form.value_gain).contiguous()


def _field(form: JointFormat) -> int:
    """Bits that a component of a point takes: a sign and seven, or more."""
    return 8 if form.points.abs().max() <= 127 else 16


def _fits(form: JointFormat) -> bool:
    """Whether shared memory holds the points."""
    return _field(form) == 8 and 1 << (form.bits - form.move_bits) <= HELD


def _lookup(form: JointFormat) -> str:
    """The usual one."""
    return "held" if _fits(form) else "moves"


@cache
def _tables(form: JointFormat, lookup: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What is looked up, the moves, and the scales.

    A move is the word of `_moves`. A point is four bytes in the order 0, 2, 1, 3 of its components, each a sign and seven bits,
    or, where these do not suffice and where nothing but signs is left to do, four half-precision numbers.
    """
    if lookup not in LOOKUPS:
        raise ValueError(f"no lookup {lookup!r}; there are {', '.join(LOOKUPS)}")
    # As many rows as a code can name, zero where the codebook has none.
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
    """(n, 4) integers -> (n,) int64 of four half-precision numbers each, integer / `FRACTION`, the first in the lowest bits."""
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


def _block_table(pages: Pages, block: int, group: int) -> tuple[Tensor, int]:
    """Where the kernel finds each block of tokens, (blocks, `COLUMNS`) int64; and what divides addresses of codes and centres.

    Columns: addresses of key codes, key scales, key centres, the largest exponents in these, value codes and value scales of
    its first token; in the same order the distances from one key head to the next in bytes; number of tokens; place of the
    first.
    """
    if "triton" not in pages.memo:
        notes = pages.notes("triton", partial(_block_rows, block=block, group=group))
        table = torch.cat([rows for rows, _ in notes])
        blocks = torch.tensor([len(rows) for rows, _ in notes])
        table[:, -1] += torch.tensor(pages.starts[:-1]).repeat_interleave(blocks)
        row_bytes = pages.pages[0][0].tensors["codes"].shape[-1]
        align = gcd(16, row_bytes, *table[:, [0, 2, 4, 6, 8, 10]].flatten().tolist())
        pages.memo["triton"] = table.to(pages.pages[0][0].device), align
    return pages.memo["triton"]


def _block_rows(keys: Coded, values: Coded, block: int, group: int) -> tuple[Tensor, list[Tensor | None]]:
    """One page's rows, places counted from its first token; and the tensors that they point to, which may be copies."""
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
