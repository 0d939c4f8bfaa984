"""Sparse reading: selection of the blocks of a quantised tier that a query reads, by estimated scores.

As in Quest (arXiv 2406.10774) and MoBA (arXiv 2502.13189) a query reads only the blocks of 64 tokens with the highest
estimates. The estimate for a block is the query's score with the mean of its keys, which the codec keeps, plus `SPREAD` times a
typical deviation from it: the length of the query times the largest root mean square of a centred key. It costs one score a
block instead of one a token. Blocks that a query sees nothing of, by the mask or by position, are not selected before others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tessera.kernels import AttendParams, CompressedKV
from tessera.tiers import BLOCK, KVSource

#: Weight of the typical deviation of a score, chosen with `benchmarks/sparse_reading.py`.
SPREAD = 1.5
#: Maximum bytes of a mask; more queries are processed in turn.
MOST = 16 << 20


def queries_at_a_time(q: Tensor, tokens: int) -> int:
    """Number of queries of (rows, q_heads, queries, head_dim) whose masks over so many tokens fit the limit."""
    return max(1, MOST // max(1, q.shape[0] * q.shape[1] * tokens))


def selected(
    q: Tensor, pages: CompressedKV, top: int, params: AttendParams, known: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Select the tokens that queries read.

    Args:
        q: (rows, q_heads, queries, head_dim).
        pages: whose tokens are whole blocks, and whose codec keeps a summary of each block of keys.
        top: number of tokens that a query reads at most, a multiple of `BLOCK`. The query heads that share a key head read the
            same ones, those with the highest estimate for any of them.
        params: what queries see of these tokens, by a mask or by position; a block counts as seen where each shows a token.
        known: the `summaries` of the pages; None: they are asked for.

    Returns:
        (rows, q_heads, queries, tokens) bool.
    """
    means, widths = summaries(pages) if known is None else known
    rows, kv_heads, blocks, dim = means.shape
    heads, queries = q.shape[1], q.shape[2]
    narrow = pages.narrowed(q.float()).reshape(rows, kv_heads, -1, dim)
    prospect = narrow @ means.mT + SPREAD * narrow.norm(dim=-1, keepdim=True) * widths.unsqueeze(2)
    prospect = prospect.view(rows, heads, queries, blocks)
    if (seen_blocks := _seen(params, queries, blocks, q.device)) is not None:
        prospect = prospect.masked_fill(~seen_blocks, -torch.inf)
    best = prospect.view(rows, kv_heads, heads // kv_heads, queries, blocks).amax(2)
    found = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, best.topk(top // BLOCK, dim=-1).indices, True)
    return found.repeat_interleave(heads // kv_heads, dim=1).repeat_interleave(BLOCK, dim=-1)


def _seen(params: AttendParams, queries: int, blocks: int, device: torch.device) -> Tensor | None:
    """Whether a query sees any token of a block, (rows or 1, q_heads or 1, queries, blocks) bool; None: it always does."""
    seen = None if params.mask is None else params.mask.unflatten(-1, (blocks, BLOCK)).any(-1)
    if params.start is not None:
        query = torch.arange(params.start, params.start + queries, device=device)[:, None]
        first = torch.arange(0, blocks * BLOCK, BLOCK, device=device)
        near = first <= query
        if params.window is not None:
            near = near & (first + BLOCK > query - params.window + 1)
        seen = near if seen is None else seen & near
    return seen


def summaries(pages: CompressedKV) -> tuple[Tensor, Tensor]:
    """Return means (rows, kv_heads, blocks, head_dim) of each block's coded keys, and widths (rows, kv_heads, blocks)."""
    # Computed in each call: keeping them would add many bytes to the cache.
    codec, _ = pages.codecs
    return codec.summary([keys for keys, _ in pages.pages])


def in_parts(q: Tensor, source: KVSource, params: AttendParams) -> Iterator[tuple[slice, AttendParams]]:
    """Yield as many queries at a time as the limit of masks allows, and their parameters with the mask of what they read."""
    assert isinstance(source.held, CompressedKV)
    assert source.top is not None
    size, known = queries_at_a_time(q, source.tokens), summaries(source.held)
    for begin in range(0, q.shape[2], size):
        part = slice(begin, begin + size)
        own = params.queries(part.start, part.stop)
        chosen = selected(q[:, :, part], source.held, source.top, own, known)
        yield part, replace(own, mask=chosen if own.mask is None else chosen & own.mask)
