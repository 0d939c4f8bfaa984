"""Attention of a decoding step to all sources in one call, and the merge of their results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tessera.kernels import cpu
from tessera.kernels.compressed_kv import CompressedKV
from tessera.kernels.source import Source

#: The rule of a source that every query reads completely, see `_rule`.
EVERYWHERE = (False, 0, 0)


def attend_sources(
    q: Tensor, sources: Sequence[Source], scale: float, softcap: float | None = None, *, level: str | None = None
) -> Tensor | None:
    """`tessera.kernels.dispatch.attend_sources`. `level`: instruction set; None: the best there is."""
    if cpu.MISSING is not None or q.device.type != "cpu" or not q.numel() or (q.requires_grad and torch.is_grad_enabled()):
        return None
    exact: list[int] = []
    packed: tuple[CompressedKV, Source] | None = None
    kv_heads = 0
    for source in sources:
        held = source.held
        if isinstance(held, CompressedKV):
            if packed is not None or not _prepared(held, q):
                return None
            packed, kv_heads = (held, source), held.shape[1]
            continue
        k, v = held
        if cpu.attend_exact_refusal(q, k, v) is not None:
            return None
        kv_heads = k.shape[1]
        exact += (*_layout(k, v), k.shape[2], k.dtype == torch.bfloat16, *_rule(source))
    pages, rule = (None, None) if packed is None else (packed[0], _rule(packed[1]))
    return _attend(q, kv_heads, exact, pages, rule or EVERYWHERE, scale, softcap, level)


def attend_newest(
    q: Tensor,
    tiers: Sequence[tuple[Tensor, Tensor, int]],
    pages: CompressedKV | None,
    scale: float,
    *,
    level: str | None = None,
) -> Tensor | None:
    """`tessera.kernels.dispatch.attend_newest`. `level`: instruction set; None: the best there is."""
    _, heads, _, dim = q.shape
    kv_heads = tiers[0][0].shape[1]
    if cpu.MISSING is not None or not q.is_cpu or dim > cpu.MAX_DIM or heads // kv_heads > cpu.FEW_ROWS:
        return None
    if (torch.is_grad_enabled() and q.requires_grad) or (pages is not None and not _prepared(pages, q)):
        return None
    exact: list[int] = []
    for k, v, tokens in tiers:
        if k.dtype != v.dtype or k.dtype not in (torch.float32, torch.bfloat16) or not k.is_cpu:
            return None
        exact += (*_layout(k, v), tokens, k.dtype == torch.bfloat16, *EVERYWHERE)
    return _attend(q, kv_heads, exact, pages, EVERYWHERE, scale, None, level)


def _layout(k: Tensor, v: Tensor) -> tuple[int, ...]:
    """Addresses and first three strides, in bytes, of keys and of values, (batch, kv_heads, tokens, head_dim) each."""
    size = k.element_size()
    (a, b, c, _), (d, e, f, _) = k.stride(), v.stride()
    return k.data_ptr(), a * size, b * size, c * size, v.data_ptr(), d * size, e * size, f * size


def _attend(
    q: Tensor,
    kv_heads: int,
    exact: list[int],
    pages: CompressedKV | None,
    rule: tuple[bool, int, int],
    scale: float,
    softcap: float | None,
    level: str | None,
) -> Tensor:
    """Call the kernel.

    Args:
        q: (batch, q_heads, q_tokens, head_dim).
        kv_heads: number of key heads.
        exact: for each source of keys and values, `_layout`, its tokens, whether it is in bfloat16, and its rule.
        pages: prepared pages, or None, and `rule`: see `_rule`.
        scale, softcap, level: see `attend_sources`.

    Returns:
        the shape of q, float32.
    """
    batch, heads, tokens, dim = q.shape
    wide = cpu.widened(q)
    out = torch.empty(q.shape, dtype=torch.float32, device="cpu")
    given: list[Any] = [level or cpu.levels()[-1], wide.data_ptr(), out.data_ptr()]
    given += [(batch, heads, kv_heads, tokens, dim, torch.get_num_threads()), scale, softcap or 0.0, exact]
    if pages is None:
        cpu._cpu.attend_exact_sources(*given)
    else:
        keys, values, addresses, gain, narrowing, _kept = pages.memo["sources"]
        cpu._cpu.attend_sources(*given, keys, values, addresses, gain, (*rule, cpu.LIMBS), narrowing)
    return out


def _rule(source: Source) -> tuple[bool, int, int]:
    """Return whether queries have places, the place of the first, and the window or 0."""
    if source.start is None:
        return EVERYWHERE
    return True, source.start, source.window or 0


def _prepared(pages: CompressedKV, q: Tensor) -> bool:
    """Whether there is a kernel for pages; its tables are then in their memo, for all steps until the pages change."""
    if "sources" not in pages.memo:
        if cpu.attend_refusal(q, pages) is not None:
            return False
        (keys, values), kv_heads, layer = pages.form(), pages.shape[1], pages.pages[0][0].layer
        assert keys is not None
        assert values is not None
        sizes = None if pages.stats is None else pages.stats.sizes.contiguous()
        narrowing = (0, 0) if sizes is None or pages.stats is None else (sizes.data_ptr(), pages.stats.table.data_ptr())
        books = cpu.book(keys, kv_heads, layer), cpu.book(values, kv_heads, layer)
        pages.memo["sources"] = (*books, cpu.table_of(pages), values.value_gain, narrowing, sizes)
    return q.shape[1] % pages.shape[1] == 0 and q.shape[3] == pages.shape[3] and q.shape[0] == pages.shape[0]
