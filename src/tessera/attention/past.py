"""What a Tensor Cache must know of the tokens in a cache of transformers, which keeps their keys and values only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.cache.followers import follower
from tessera.cache.masks import Documents, documents
from tessera.tensor_cache.gated_read import MemoryCall


@dataclass
class Past:
    """Documents and rotary positions of the tokens of one layer.

    Attributes:
        documents: see there.
        positions: (batch, slots) int64; None: nobody needs them.
    """

    documents: Documents
    positions: Tensor | None

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.documents.number.shape[0]

    def select(self, rows: Tensor) -> None:
        """Row i of the new batch is row rows[i] of this one. rows: (n,) int64."""
        self.documents = self.documents.select(rows)
        self.positions = None if self.positions is None else self.positions[rows.to(self.positions.device)]


def tokens_so_far(call: MemoryCall, query: Tensor, slots: int, mask: Tensor | None) -> Past:
    """Documents and positions of all slots of a call, noted on its cache for the next one.

    Args:
        call: whose cache is transformers' own, or None.
        query: (batch, heads, tokens, head_dim).
        slots: tokens in the cache, the call's own included.
        mask: of the call.

    Raises:
        ValueError: if the cache holds tokens that went through attention without the memory.
    """
    batch, n = query.shape[0], query.shape[2]
    past, before = slots - n, None
    if past:
        known = None if call.cache is None else follower(call.cache, _name(call), lambda: Past(_nothing(query), None))
        held = 0 if known is None else known.documents.number.shape[1]
        if known is None or held < past or known.batch != batch:
            raise ValueError(
                f"this cache holds {past} tokens of {batch} rows, of which the Tensor Cache has seen {held}: it was filled "
                "without the memory. Begin with a new cache"
            )
        # What lies behind has been cropped.
        before = Past(known.documents.first(past), None if known.positions is None else known.positions[:, :past])
    of = documents(mask, query, slots, None if before is None else before.documents)
    positions = call.positions_of(query)
    if positions is not None:
        # A copy in any case: what the caller gave is written anew for its next call, as likely as not.
        positions = positions.expand(batch, -1)
        old = positions[:, :0] if before is None else before.positions
        assert old is not None
        positions = torch.cat((old, positions), dim=1)
    found = Past(of, positions)
    if call.cache is not None:
        noted = follower(call.cache, _name(call), lambda: found)
        noted.documents, noted.positions = found.documents, found.positions
    return found


def _name(call: MemoryCall) -> str:
    return f"tensor_cache.{call.layer}"


def _nothing(query: Tensor) -> Documents:
    none = torch.zeros((query.shape[0], 0), dtype=torch.long, device=query.device)
    return Documents(none, none, True)
