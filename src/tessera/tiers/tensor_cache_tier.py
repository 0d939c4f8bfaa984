"""The last tier of a cache with a Tensor Cache: pairs that come here are written into its matrix, and read through its gate.

Behind a window (`window:512 + tc`) a pair is written at the very query that it leaves the window of, so reading and writing
take turns within a call: the attention function does both (`tessera.attention.over_tiers`), this tier keeps the result.
Behind codecs (`hqmq:3@32768 + tc`) whole blocks come here when a call has ended.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tessera.devices import upload
from tessera.tensor_cache import TensorCache, TensorCacheState
from tessera.tiers.tier import KVSource, Pairs, Tier


class TensorCacheTier(Tier):
    """The matrix of some sequences.

    Args:
        window: tokens of the window that pairs leave one by one; None: they come from a codec in whole blocks.

    Attributes:
        state: what has been written for good, or None.
        written: what left the window at all queries before this place has been written into `state`.
        positions: (rows, n) int64, rotary positions of the newest n tokens; None: nobody needs them.
        absorb: behind codecs, within a call only: given keys and values (rows, kv_heads, n, head_dim) and the place of the
            first, writes them; None: no writer is set, so the tier is not ready.
    """

    keeps_tokens = False

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.absorb: Callable[[Tensor, Tensor, int], None] | None = None
        self.state: TensorCacheState | None = None
        self.written = 0
        self.positions: Tensor | None = None
        self._coming: tuple[TensorCacheState, int] | None = None  # of a call that has not ended yet

    # As a tier

    @property
    def tokens(self) -> int:
        """Always 0: tokens that were written cannot be told apart."""
        return 0

    @property
    def ready(self) -> bool:
        """See `Tier`."""
        return self.window is not None or self.absorb is not None

    def append(self, k: Tensor, v: Tensor, place: int) -> Pairs | None:
        """Write pairs; those that left a window were written at the query that they left it at."""
        if self.window is None:
            assert self.absorb is not None
            self.absorb(k, v, place)
        return None

    def sources(self, start: int, window: int | None) -> list[KVSource]:
        """Return no source: the matrix is read beside the softmax."""
        return []

    def buffers(self) -> list[Tensor]:
        """Every tensor of what has been written."""
        return [] if self.state is None else [t for t in self.state.tensors().values() if t.numel()]

    def select(self, rows: Tensor) -> None:
        """See `Tier`."""
        self.state = None if self.state is None else self.state.select(rows)
        self.positions = None if self.positions is None else self.positions[upload(rows, self.positions.device)]

    def to(self, device: torch.device | str) -> None:
        """See `Tier`."""
        self.state = None if self.state is None else self.state.to(device)
        self.positions = None if self.positions is None else self.positions.to(device)

    def copied(self) -> TensorCacheTier:
        """See `Tier`."""
        return copy.copy(self)

    # Within a call

    def unwritten(self, length: int) -> int:
        """Count how many of the newest of `length` queries still need the pairs that left the window at them."""
        return 0 if self.window is None else length - self.written

    def state_for(self, memory: TensorCache, pairs: Tensor) -> TensorCacheState:
        """Return the written state, or an empty one. pairs: (rows, ...)."""
        return memory.initial_state(pairs.shape[0], pairs[:, :, :0]) if self.state is None else self.state

    def propose(self, state: TensorCacheState, written: int) -> None:
        """Set what `state` and `written` become when the call ends."""
        self._coming = replace(state.detach(), seen=torch.full_like(state.seen, written)), written

    def commit(self) -> None:
        """Make the proposed state permanent at the end of a call."""
        if self._coming is not None:
            (self.state, self.written), self._coming = self._coming, None

    # Rotary positions, whose phase must be removed before a write

    def note(self, positions: Tensor | None) -> None:
        """Remember the positions of new tokens, (rows, n)."""
        if positions is not None:
            # A copy in any case: the caller is likely to overwrite its tensor for its next call.
            known = positions[:, :0] if self.positions is None else self.positions.to(positions.device)
            self.positions = torch.cat((known, positions), dim=1)

    def positions_of(self, begin: int, end: int, length: int) -> Tensor | None:
        """Positions of the places [begin, end) of `length`, (rows, n), 0 where they are not known; None: nobody needs them."""
        if self.positions is None:
            return None
        first = length - self.positions.shape[1]
        known = self.positions[:, max(0, begin - first) : max(0, end - first)]
        return torch.nn.functional.pad(known, (end - begin - known.shape[1], 0))

    def keep_positions(self, tokens: int) -> None:
        """Remove the positions of all but the newest `tokens`."""
        if self.positions is not None and self.positions.shape[1] > tokens:
            self.positions = self.positions[:, self.positions.shape[1] - tokens :].clone()

    def crop(self, tokens: int, rest: int) -> None:
        """Remove the newest `tokens` of the sequence; `rest` remain."""
        self.written = min(self.written, rest)
        if self.positions is not None:
            self.positions = self.positions[:, : max(0, self.positions.shape[1] - tokens)].clone()
