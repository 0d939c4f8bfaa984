"""Triton kernels for GPUs. Triton is imported when one of them first runs."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from math import gcd

import torch
from torch import Tensor

from tessera.kernels import error_feedback, pack
from tessera.kernels.compressed_kv import Coded, CompressedKV, strided
from tessera.kernels.joint import JointFormat
from tessera.kernels.nearest import ROOT, CellIndex, Codewords
from tessera.kernels.params import AttendParams
from tessera.kernels.scalars import ScalarFormat
from tessera.kernels.triton.block_table import block_of, block_table, kept_fields
from tessera.kernels.triton.formats import (
    Readable,
    code_options,
    dim_refusal,
    lookups,
    options,
    power,
    readable,
    step_of,
    usual_lookup,
)
from tessera.kernels.triton.tables import index_bias, index_bounds, index_tables, rotations, tables

#: Maximum number of query rows of a program, by whether head_dim is over 128; more are split among programs. So many fit in
#: registers, and Triton 3.6 fails to compile 64.
ROWS = {False: 32, True: 16}
#: Minimum number of programs for each multiprocessor.
WAVES = 4


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing() -> str | None:
    """Say why there are no Triton kernels here, or return None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'tessera[gpu]'"
    if not torch.cuda.is_available() and not interpreted():
        return "there is no CUDA device"
    return None


def _on(device: torch.device) -> AbstractContextManager[None]:
    """Make the tensors' device the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def attend_refusal(q: Tensor, pages: CompressedKV) -> str | None:
    """Say why `attend` cannot be used, or return None if it can."""
    keys, _ = pages.pages[0]
    dim = pages.shape[3]
    if missing() is not None:
        return missing()
    if torch.is_grad_enabled() and q.requires_grad:
        return "the Triton kernels have no gradients"
    if not interpreted() and not (q.is_cuda and keys.device == q.device):
        return f"the queries are on {q.device} and the cache on {keys.device}"
    if (lacking := pages.lacking(readable)) is not None:
        return f"there is no Triton kernel for {lacking}"
    return dim_refusal(pages.form(), dim)


def attend(
    q: Tensor,
    pages: CompressedKV,
    params: AttendParams,
    *,
    splits: int | None = None,
    lookup: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`tessera.kernels.reference.attend` in Triton.

    Args:
        q, pages, params: as there.
        splits: number of parts that the tokens are split into; None: enough to fill the device.
        lookup: one of `formats.lookups`, for keys and values; None: for each `formats.usual_lookup`.
    """
    keys, values = pages.check(q, params)
    if (lacking := pages.lacking(readable)) is not None:
        raise ValueError(f"there is no Triton kernel for {lacking}")
    blocks, *aligns = block_table(pages, *block_of(keys))
    return attend_blocks(
        pages.narrowed(q),
        blocks,
        (keys, values),  # type: ignore[arg-type]
        params,
        kv_heads=pages.shape[1],
        aligns=(aligns[0], aligns[1]),
        centred="centre" in pages.pages[0][0].tensors,
        splits=splits,
        lookup=lookup,
    )


def attend_blocks(
    q: Tensor,
    blocks: Tensor,
    forms: tuple[Readable, Readable],
    params: AttendParams,
    *,
    kv_heads: int,
    aligns: tuple[int, int],
    centred: bool,
    splits: int | None = None,
    lookup: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Do what `attend` does over blocks of tokens that a table names.

    Args:
        q: queries for keys with scaled channels, see `CompressedKV.narrowed`.
        params, splits, lookup: as for `attend`.
        blocks: (blocks, columns) int64 on the device, see `block_table.block_table`; of `block_of` tokens at most.
        forms: formats of the codes of keys and of values.
        kv_heads: number of key heads of the tokens.
        aligns: divisor of all addresses of key codes and centres, and divisor of those of value codes.
        centred: whether keys have centres.

    Raises:
        ValueError: for a lookup or a head_dim that the formats do not have.
    """
    from tessera.kernels.triton.attend_kernel import attend_kernel

    keys, values = forms
    batch, heads, tokens, dim = q.shape
    if (why := dim_refusal(forms, dim)) is not None:
        raise ValueError(why)
    group, lines = heads // kv_heads, batch * kv_heads
    rows = group * tokens
    ways = [lookup if lookup in lookups(form) else usual_lookup(form) for form in forms]
    if lookup is not None and lookup not in ways:
        ways[0] = lookup  # which is refused, naming those that there are
    codes, value_codes = (code_options(form, way, dim, align) for form, way, align in zip(forms, ways, aligns, strict=True))
    rotation, halved, _ = rotations(keys, ways[0], dim, q.device)
    _, _, back = rotations(values, ways[1], dim, q.device)
    query, shifted, unit = _prepared(q, params.scale, rotation)
    if len(blocks) == 0:
        none = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        return none, none.new_full(q.shape[:-1], -torch.inf)

    tile = min(ROWS[dim > 128], power(rows))
    tiles = -(-rows // tile)
    if splits is None:
        wanted = WAVES * torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 2
        splits = max(1, min(-(-len(blocks) // 2), -(-wanted // (lines * tiles))))
    per_split = -(-len(blocks) // splits)
    splits = -(-len(blocks) // per_split)
    out = torch.empty((splits, lines, rows, dim), device=q.device, dtype=torch.float32)
    lse = torch.empty((splits, lines, rows), device=q.device, dtype=torch.float32)
    mask, strides = strided(params.mask)
    placed = params.start is not None
    with _on(q.device):
        attend_kernel[(lines, splits, tiles)](
            query,
            shifted,
            unit,
            halved,
            blocks,
            *tables(keys, codes["LOOKUP"], q.device),
            *tables(values, value_codes["LOOKUP"], q.device),
            query if mask is None else mask.view(torch.uint8),
            out,
            lse,
            *strides,
            step_of(keys),
            step_of(values),
            params.softcap or 0.0,
            params.start or 0,
            params.window or 0,
            len(blocks),
            per_split,
            lines,
            kv_heads,
            group,
            rows,
            tokens,
            **options(dim, tile, codes, value_codes, block_of(keys)[0]),
            APART=values is not keys,
            CENTRED=centred,
            MASKED=mask is not None,
            PLACED=placed,
            WINDOWED=placed and params.window is not None,
            CAPPED=bool(params.softcap),
        )
    whole, total = _joined(out.view(splits, -1, dim), lse.view(splits, -1))
    return (whole @ back).view(batch, heads, tokens, dim), total.view(batch, heads, tokens)


def _prepared(q: Tensor, scale: float, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first three arguments of the kernel, each with the rows of a head in sequence."""
    from tessera.kernels.triton.prepare_kernel import SLICE, TILE, prepare_kernel

    dim, rows = q.shape[-1], q.numel() // q.shape[-1]
    query = torch.empty((rows, dim), device=q.device, dtype=torch.float32)
    shifted, unit = torch.empty_like(query, dtype=torch.float16), query.new_empty(rows)
    with _on(q.device):
        prepare_kernel[(-(-rows // TILE),)](
            q.detach().contiguous(),
            rotation,
            query,
            shifted,
            unit,
            scale,
            rows,
            DIM=dim,
            WIDTH=power(dim),
            TILE=TILE,
            SLICE=SLICE,
        )
    return query, shifted, unit


def _joined(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge all splits into one softmax: (splits, rows, dim) and (splits, rows) -> (rows, dim) and (rows,)."""
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
            WIDTH=power(dim),
            SPLITS=power(splits),
            TOGETHER=TOGETHER,
        )
    return whole, total


def merge_refusal(parts: Sequence[tuple[Tensor, Tensor]]) -> str | None:
    """Say why `merge` cannot or need not be used, or return None."""
    if len(parts) == 1:
        return "one part is the whole already"
    if any(x.dtype != torch.float32 or x.requires_grad for part in parts for x in part):
        return "the kernel takes float32 without gradients"
    return device_refusal(parts[0][0])


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """`tessera.kernels.reference.merge` in Triton, for float32 results on the device."""
    shape = parts[0][0].shape
    out = torch.stack([out for out, _ in parts]).view(len(parts), -1, shape[-1])
    lse = torch.stack([lse for _, lse in parts]).view(len(parts), -1)
    if lse.shape[1] == 0:
        return parts[0]
    whole, total = _joined(out, lse)
    return whole.view(shape), total.view(shape[:-1])


def decode(packed: Coded) -> Tensor:
    """Decode packed vectors to (batch, heads, tokens, head_dim) float32."""
    from tessera.kernels.triton.attend_kernel import BLOCK
    from tessera.kernels.triton.decode_kernel import decode_kernel

    batch, heads, tokens, dim = packed.shape
    form = packed.codec.kernel_format(dim)
    if form is None or not readable(form):
        raise ValueError(f"there is no Triton kernel for {packed.codec.spec}")
    kept = kept_fields(packed)
    codes = kept["codes"].contiguous()
    scale = kept["scale"].contiguous() if "scale" in kept else codes
    out = torch.empty(packed.shape, dtype=torch.float32, device=codes.device)
    if out.numel():
        lookup = usual_lookup(form)
        align = gcd(16, codes.shape[-1], codes.data_ptr())
        with _on(codes.device):
            decode_kernel[(batch * heads, -(-tokens // BLOCK))](
                codes,
                scale,
                *tables(form, lookup, codes.device),
                out,
                tokens * codes.shape[-1],
                tokens,
                step_of(form),
                tokens,
                CHUNKS=dim // 4,
                WIDTH=power(dim // 4),
                BLOCK=BLOCK,
                **code_options(form, lookup, dim, align),
            )
    out = out @ rotations(form, usual_lookup(form), dim, codes.device)[2]
    if isinstance(form, JointFormat) and packed.role == "key":
        out = out / form.value_gain
        if "centre" in packed.tensors:
            group = (packed.offset + torch.arange(tokens, device=codes.device)) // form.group
            words = packed.tensors["centre"][:, :, group]
            out = out * torch.exp2((words & 15).float()) + (words & -16).view(torch.float16).float()
    return out


def nearest(x: Tensor, index: CellIndex) -> Tensor:
    """`tessera.kernels.nearest.nearest` in Triton: (n, 4) float32 -> (n,) int64, rows of the index's words."""
    from tessera.kernels.triton.nearest_kernel import BLOCK, FEW, TILE, full_search_kernel, nearest_kernel

    x = x.contiguous()
    found = torch.empty(len(x), dtype=torch.int32, device=x.device)
    if len(x) == 0:
        return found.long()
    tables = index_tables(index)
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
            *index_bounds(index),
            DEPTH=index.depth,
            CONJUGATIONS=index.conjugations,
            BLOCK=BLOCK,
        )
        # On the device too, so that the host need not know whether there are any.
        full_search_kernel[(-(-len(x) // FEW),)](
            x, index.words, index_bias(index), found, len(x), len(index.words), FEW=FEW, TILE=TILE
        )
    return found.long()


def nearest_codes(x: Tensor, book: Codewords) -> Tensor:
    """`tessera.kernels.pack.nearest_codes` with the search in Triton."""
    return pack.nearest_codes(x, book, nearest)


def encode_feedback(y: Tensor, matrix: Tensor, book: Codewords) -> Tensor:
    """`tessera.kernels.error_feedback.encode_feedback` with the search in Triton."""
    return error_feedback.encode_feedback(y, matrix, book, nearest)


def pack_nearest(x: Tensor, scale: Tensor, book: Codewords, bits: int) -> Tensor:
    """`tessera.kernels.pack.pack_nearest` with the search in Triton."""
    return pack.pack_nearest(x, scale, book, bits, nearest)


def device_refusal(x: Tensor) -> str | None:
    """Say why kernels cannot take a tensor, which must be on a GPU, or on the CPU where Triton interprets, or return None."""
    there = x.device.type == "cuda" or interpreted()
    return missing() or (None if there else f"the numbers are on {x.device}")


def decode_refusal(packed: Coded) -> str | None:
    """Say why `decode` cannot be used, or return None if it can."""
    dim = packed.shape[3]
    if missing() is not None:
        return missing()
    if packed.device.type != "cuda" and not interpreted():
        return f"the codes are on {packed.device}"
    form = packed.codec.kernel_format(dim)
    if not readable(form):
        return f"there is no Triton kernel for {packed.codec.spec}"
    if (why := dim_refusal([form], dim)) is not None:
        return why
    if isinstance(form, ScalarFormat) and form.numbers not in ("uniform", "fp8"):
        return f"the Triton kernels round the numbers of {packed.codec.spec} to half precision, which is no decoding of it"
    return None
