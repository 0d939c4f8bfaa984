"""Encoding in C++: the search for the nearest codeword, and the packing of codes."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tessera.kernels.bits import packed_bytes
from tessera.kernels.cpu import MAX_DIM, _cpu, addresses, book, chunks_refusal, levels
from tessera.kernels.joint import JointFormat
from tessera.kernels.nearest import Codewords, reduction_tables
from tessera.kernels.paged import GROUP


def nearest(x: Tensor, book: Codewords, level: str | None = None) -> Tensor:
    """`tessera.kernels.pack.nearest_codes` in C++.

    Args:
        x: (n, 4) float32, finite.
        book: the codebook.
        level: instruction set; None: the best there is.

    Returns:
        (n,) int32.
    """
    return _nearest(x, book, level, words=False)[0]


def nearest_words(x: Tensor, book: Codewords, level: str | None = None) -> tuple[Tensor, Tensor]:
    """Find codes as `nearest` does; returns the codes and their codewords, (n, 4) float32."""
    return _nearest(x, book, level, words=True)


def _nearest(x: Tensor, book: Codewords, level: str | None, words: bool) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    codes = torch.empty(len(x), dtype=torch.int32, device="cpu")
    found = torch.empty(x.shape if words else (0, 4), dtype=torch.float32, device="cpu")
    to = (codes.data_ptr(), found.data_ptr() if words else 0, torch.get_num_threads())
    _cpu.nearest(_index(book), level or levels()[-1], x.data_ptr(), len(x), *to)
    return codes, found


_INDICES: WeakKeyDictionary[Codewords, Any] = WeakKeyDictionary()


def _index(book: Codewords) -> Any:
    if book not in _INDICES:
        tables = [table.flatten().numpy() for table in reduction_tables()]
        _INDICES[book] = _cpu.Index(book.products.numpy(), book.codes.int().numpy(), book.conjugations, book.step, *tables)
    return _INDICES[book]


def pack_nearest(x: Tensor, scale: Tensor, book: Codewords, bits: int, level: str | None = None) -> Tensor:
    """`tessera.kernels.pack.pack_nearest`; `level`: see `nearest`."""
    x, scale = x.contiguous(), scale.contiguous()
    dim = x.shape[-1]
    out = _packed(x, -(-dim // 4), bits)
    where = (x.data_ptr(), scale.data_ptr(), scale.numel(), dim, bits, out.data_ptr(), torch.get_num_threads())
    if out.numel():
        _cpu.pack_nearest(_index(book), level or levels()[-1], *where)
    return out


def encode_feedback(y: Tensor, feedback: Tensor, book: Codewords, level: str | None = None) -> Tensor:
    """`tessera.kernels.error_feedback.encode_feedback`, codes as int32; `level`: see `nearest`."""
    y, feedback = y.contiguous(), feedback.contiguous()
    heads, vectors, dim = y.shape
    codes = torch.empty(heads, vectors, dim // 4, dtype=torch.int32, device="cpu")
    where = (y.data_ptr(), feedback.data_ptr(), heads, vectors, dim, codes.data_ptr(), torch.get_num_threads())
    if codes.numel():
        _cpu.encode_feedback(_index(book), level or levels()[-1], *where)
    return codes


def encode_joint_refusal(x: Tensor, form: JointFormat) -> str | None:
    """Say why `encode_joint` cannot be used, or return None if it can."""
    if (why := chunks_refusal(x)) is not None:
        return why
    if x.shape[-1] % 4 or x.shape[-1] > MAX_DIM:
        return f"there is no kernel for vectors of {x.shape[-1]} numbers"
    if form.group not in (1, GROUP):
        return f"there is no kernel for groups of {form.group} tokens"
    return None


def encode_joint(
    x: Tensor, form: JointFormat, words: Codewords, centred: bool, weights: Tensor | None, level: str | None = None
) -> dict[str, Tensor]:
    """Encode as `tessera.kernels.dispatch.encode_joint` says. `level`: see `nearest`."""
    x, weights = x.contiguous(), None if weights is None else weights.to(x).contiguous()
    batch, heads, tokens, dim = x.shape
    kept = {
        "codes": torch.empty(batch, heads, tokens, packed_bytes(dim // 4, form.bits), dtype=torch.uint8, device="cpu"),
        "scale": torch.empty(batch, heads, tokens, dtype=torch.uint8, device="cpu"),
    }
    if centred:
        kept["centre"] = torch.empty(batch, heads, -(-tokens // GROUP), dim, dtype=torch.int16, device="cpu")
    if x.numel():
        shape = [batch * heads, tokens, dim, torch.get_num_threads()]
        where = addresses([x, weights, kept.get("centre"), kept["scale"], kept["codes"]])
        if not _cpu.encode_joint(_index(words), book(form, heads, 0), level or levels()[-1], shape, *where):
            raise ValueError("the weights of a channel's errors must be positive")
    return kept


def pack_linear(
    x: Tensor, low: Tensor | None, scale: Tensor, limits: tuple[int, int], bits: int, group: int, span: int
) -> Tensor:
    """`tessera.kernels.pack.pack_linear`."""
    held = [None if t is None else t.contiguous() for t in (x, low, scale)]
    tokens, dim = x.shape[-2:]
    out = _packed(x, dim, bits)
    if out.numel():
        shape = [x.numel() // (tokens * dim), tokens, dim, group, span]
        _cpu.pack_linear(addresses(held), shape, *limits, bits, out.data_ptr(), torch.get_num_threads())
    return out


def pack_levels(x: Tensor, divisor: Tensor, factor: float, bounds: Tensor, values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """`tessera.kernels.pack.pack_levels`."""
    held = [t.contiguous() for t in (x, divisor, bounds, values)]
    out, chosen = _packed(x, x.shape[-1], bits), torch.empty_like(held[0])
    if out.numel():
        to = (out.data_ptr(), chosen.data_ptr(), torch.get_num_threads())
        _cpu.pack_levels(addresses(held), divisor.numel(), x.shape[-1], factor, bits, *to)
    return out, chosen


def pack_blocks(x: Tensor, ratio: Tensor, scale: Tensor, bits: int) -> Tensor:
    """`tessera.kernels.pack.pack_blocks`."""
    x, ratio, scale = x.contiguous(), ratio.contiguous(), scale.contiguous()
    out = torch.empty(*x.shape[:-1], 2 + 4 * bits, dtype=torch.uint8, device="cpu")
    where = (x.data_ptr(), ratio.data_ptr(), scale.data_ptr(), ratio.numel(), bits, out.data_ptr(), torch.get_num_threads())
    if out.numel():
        _cpu.pack_blocks(*where)
    return out


def _packed(x: Tensor, count: int, bits: int) -> Tensor:
    """Allocate the bytes of `count` codes for each vector of x."""
    return torch.empty(*x.shape[:-1], -(-count * bits // 8), dtype=torch.uint8, device="cpu")
