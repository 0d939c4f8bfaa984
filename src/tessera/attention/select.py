"""Sparse reading: selection of the blocks of a quantised tier that a query reads, by estimated scores.

As in Quest (arXiv 2406.10774) and MoBA (arXiv 2502.13189) a query reads only the blocks of 64 tokens with the highest
estimates. The estimate for a block is the query's score with the mean of its keys, which the codec keeps, plus `SPREAD` times a
typical deviation from it: the length of the query times the largest root mean square of a centred key. It costs one score a
block instead of one a token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tessera.kernels import CompressedKV
from tessera.tiers import BLOCK, KVSource

#: Weight of the typical deviation of a score, chosen with `benchmarks/sparse_reading.py`.
SPREAD = 1.5
#: Maximum bytes of a mask; more queries are processed in turn.
MOST = 16 << 20


def queries_at_a_time(q: Tensor, tokens: int) -> int:
    """Number of queries of (rows, q_heads, queries, head_dim) whose masks over so many tokens fit the limit."""
    return max(1, MOST // max(1, q.shape[0] * q.shape[1] * tokens))


def selected(q: Tensor, pages: CompressedKV, top: int, known: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Select the tokens that queries read.

    Args:
        q: (rows, q_heads, queries, head_dim).
        pages: whose tokens are whole blocks, and whose codec keeps a summary of each block of keys.
        top: number of tokens that a query reads at most, a multiple of `BLOCK`. The query heads that share a key head read the
            same ones, those with the highest estimate for any of them.
        known: the `summaries` of the pages; None: they are asked for.

    Returns:
        (rows, q_heads, queries, tokens) bool.
    """
    means, widths = summaries(pages) if known is None else known
    rows, kv_heads, blocks, dim = means.shape
    heads, queries = q.shape[1], q.shape[2]
    seen = pages.narrowed(q.float()).view(rows, kv_heads, -1, dim)
    prospect = seen @ means.mT + SPREAD * seen.norm(dim=-1, keepdim=True) * widths.unsqueeze(2)
    best = prospect.view(rows, kv_heads, heads // kv_heads, queries, blocks).amax(2)
    found = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, best.topk(top // BLOCK, dim=-1).indices, True)
    return found.repeat_interleave(heads // kv_heads, dim=1).repeat_interleave(BLOCK, dim=-1)


def summaries(pages: CompressedKV) -> tuple[Tensor, Tensor]:
    """Return means (rows, kv_heads, blocks, head_dim) of each block's coded keys, and widths (rows, kv_heads, blocks)."""
    # Computed in each call: keeping them would add many bytes to the cache.
    codec, _ = pages.codecs
    return codec.summary([keys for keys, _ in pages.pages])


def in_parts(q: Tensor, source: KVSource) -> Iterator[tuple[slice, Tensor]]:
    """Yield as many queries at a time as the limit of masks allows, and the mask of what they read of a source."""
    assert isinstance(source.held, CompressedKV)
    assert source.top is not None
    size, known = queries_at_a_time(q, source.tokens), summaries(source.held)
    for begin in range(0, q.shape[2], size):
        part = slice(begin, begin + size)
        yield part, selected(q[:, :, part], source.held, source.top, known)
