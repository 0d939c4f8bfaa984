"""Triton kernels for GPUs. Triton is imported when one of them first runs."""

from __future__ import annotations

import importlib.util
import os
from functools import cache, partial

import torch
from torch import Tensor

from tessera.kernels.joint import JointFormat
from tessera.kernels.nearest import ROOT, CellIndex, brute_force, reduction_tables
from tessera.kernels.pages import Coded, Pages, strided
from tessera.kernels.reference import merge
from tessera.quaternion import units

#: Longest head that the kernels know.
MAX_DIM = 256
#: Query rows of a program at most; more are split among programs.
ROWS = 64
#: How a codeword is looked up. "moves": a word of its point, of 8 KiB for codes of 16 bits, whose bytes are then permuted and
#: negated. "words": a word of the codeword itself, of 256 KiB. "halves": two words of two half-precision numbers each, 512 KiB,
#: which need not be unpacked.
LOOKUPS = ("moves", "words", "halves")
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
    lookup: str = LOOKUPS[0],
) -> tuple[Tensor, Tensor]:
    """`tessera.kernels.reference.attend` in Triton.

    Args:
        q, pages, scale, mask, softcap, start, window: as there.
        splits: parts that the tokens are cut into; None: as many as keep the device busy.
        lookup: one of `LOOKUPS`.
    """
    from tessera.kernels.triton.attend_kernel import BLOCK, attend_kernel

    form = pages.check(q, mask)
    if not isinstance(form, JointFormat):
        raise ValueError(f"there is no Triton kernel for {pages.pages[0][0].codec.spec}")
    batch, heads, tokens, dim = q.shape
    kv_heads = pages.shape[1]
    group, lines = heads // kv_heads, batch * kv_heads
    rows = group * tokens
    query = (q.detach().float() * scale).reshape(lines, rows, dim).contiguous()
    rotation = _rotation(form, dim, q.device)
    turned = query if rotation is None else query @ rotation
    unit = turned.abs().amax(-1).clamp(min=1e-30)
    turned = (turned / unit.unsqueeze(-1)).half()
    blocks = _block_table(pages, BLOCK, form.group)
    tables = _tables(form, lookup, q.device)

    tile = min(ROWS, max(16, 1 << (rows - 1).bit_length()))
    tiles = -(-rows // tile)
    if splits is None:
        wanted = WAVES * torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 2
        splits = max(1, min(-(-len(blocks) // 2), -(-wanted // (lines * tiles))))
    per_split = -(-len(blocks) // splits)
    splits = -(-len(blocks) // per_split)
    out = torch.empty((splits, lines, rows, dim), device=q.device, dtype=torch.float32)
    lse = torch.empty((splits, lines, rows), device=q.device, dtype=torch.float32)
    mask, strides = strided(mask)
    chunks = dim // 4
    attend_kernel[(lines, splits, tiles)](
        query,
        turned,
        unit,
        query if rotation is None else rotation,
        blocks,
        *tables,
        query if mask is None else mask.view(torch.uint8),
        out,
        lse,
        *strides,
        form.step,
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
        -(-chunks * form.bits // 8),
        CHUNKS=chunks,
        WIDTH=max(16, 1 << (chunks - 1).bit_length()),
        ROWS=tile,
        BITS=form.bits,
        LOOKUP=lookup,
        MOVE_BITS=form.move_bits,
        FIELD=_field(form),
        CENTRED="centre" in pages.pages[0][0].tensors,
        ROTATED=rotation is not None,
        MASKED=mask is not None,
        PLACED=start is not None,
        WINDOWED=start is not None and window is not None,
        CAPPED=bool(softcap),
        BLOCK=BLOCK,
    )
    whole, lse = merge(list(zip(out.unbind(), lse.unbind(), strict=True)))
    whole = whole * form.value_gain
    if rotation is not None:
        whole = whole @ rotation.T
    return whole.view(batch, heads, tokens, dim), lse.view(batch, heads, tokens)


def nearest(x: Tensor, index: CellIndex) -> Tensor:
    """`tessera.kernels.nearest.nearest` in Triton: (n, 4) float32 -> (n,) int64, rows of the index's words."""
    from tessera.kernels.triton.nearest_kernel import BLOCK, nearest_kernel

    x = x.contiguous()
    found = torch.empty(len(x), dtype=torch.int32, device=x.device)
    if len(x) == 0:
        return found.long()
    tables = _index_tables(index)
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


@cache
def _rotation(form: JointFormat, dim: int, device: torch.device) -> Tensor | None:
    """(dim, dim), x @ it is the rotated x; None if the codec does not rotate."""
    if not form.signs.numel():
        return None
    hadamard = torch.ones(1, 1)
    while len(hadamard) * len(form.dct) < dim:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard) / 2**0.5
    return (torch.kron(form.dct, hadamard) * form.signs).T.contiguous().to(device)


def _field(form: JointFormat) -> int:
    """Bits that a component of a codeword takes."""
    return 8 if form.points.abs().max() <= 127 else 16


@cache
def _tables(form: JointFormat, lookup: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is looked up, the moves' permutations and signs by bytes, and the scales."""
    if lookup not in LOOKUPS:
        raise ValueError(f"no lookup {lookup!r}; there are {', '.join(LOOKUPS)}")
    # As many rows as a code can name, zero where the codebook has none.
    points = torch.zeros(1 << (form.bits - form.move_bits), 4, dtype=torch.long)
    points[: len(form.points)] = form.points.long()
    if lookup != "moves":
        points = (points[:, form.permutation] * form.sign).flatten(0, 1)
    table = points.half().view(torch.int32) if lookup == "halves" else _joined(points, _field(form))
    by_byte = torch.arange(4) * 8
    control = (form.permutation << by_byte).sum(-1).int()
    negate = ((form.sign < 0).long() << by_byte).sum(-1).int()
    return table.contiguous().to(device), control.to(device), negate.to(device), form.scales.to(device)


def _joined(points: Tensor, field: int) -> Tensor:
    """(n, 4) integers -> (n,) words of four fields: int32, or int64 if a field has 16 bits."""
    words = ((points & ((1 << field) - 1)) << (torch.arange(4) * field)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int() if field == 8 else words


def _block_table(pages: Pages, block: int, group: int) -> Tensor:
    """Where the kernel finds each block of tokens: (blocks, 12) int64.

    Columns: addresses of key codes, key scales, key centres, value codes and value scales of its first token; in the same
    order the distances from one key head to the next in bytes; number of tokens; place of the first.
    """
    if "triton" not in pages.memo:
        notes = pages.notes("triton", partial(_block_rows, block=block, group=group))
        table = torch.cat([rows for rows, _ in notes])
        blocks = torch.tensor([len(rows) for rows, _ in notes])
        table[:, -1] += torch.tensor(pages.starts[:-1]).repeat_interleave(blocks)
        pages.memo["triton"] = table.to(pages.pages[0][0].device)
    return pages.memo["triton"]


def _block_rows(keys: Coded, values: Coded, block: int, group: int) -> tuple[Tensor, list[Tensor | None]]:
    """One page's rows, places counted from its first token; and the tensors that they point to, which may be copies."""
    fields = [keys.tensors["codes"], keys.tensors["scale"], keys.tensors.get("centre")]
    fields += [values.tensors["codes"], values.tensors["scale"]]
    kept = [None if field is None else field.contiguous() for field in fields]
    strides = [0 if field is None else field.stride(1) * field.element_size() for field in kept]
    steps = [0 if field is None else field.stride(2) * field.element_size() for field in kept]
    rows, token = [], 0
    while token < keys.tokens:
        # A block never crosses from one group into the next.
        size = min(block, keys.tokens - token, block - (keys.offset + token) % block)
        first = [token, token, (keys.offset + token) // group, token, token]
        addresses = [0 if f is None else f.data_ptr() + n * step for f, n, step in zip(kept, first, steps, strict=True)]
        rows.append([*addresses, *strides, size, token])
        token += size
    return torch.tensor(rows), kept
