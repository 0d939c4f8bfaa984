"""Statistics that a group collects of its first tokens before any of their keys are quantised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.codecs.channel_stats import KeyStats
from tessera.devices import upload

#: Number of tokens whose queries and keys the statistics are computed from. Until then all tokens stay exact.
LEARN = 128


class Learning:
    """Statistics of the first tokens' queries, kept token by token, so that a crop can remove them."""

    def __init__(self) -> None:
        self._squares: Tensor | None = None
        #: Queries of single tokens, (rows, kv_heads, group, 1, head_dim) float32 each, whose squares are computed together
        #: later, because a step has no time to spare. A copy of this object shares the list, which is therefore never changed.
        self._single: list[Tensor] = []

    @property
    def tokens(self) -> int:
        """Number of tokens whose queries have been collected."""
        return len(self._single) + (0 if self._squares is None else self._squares.shape[2])

    @property
    def squares(self) -> Tensor | None:
        """(rows, kv_heads, tokens, head_dim) float32, means over the query heads of a key head; None: no token yet."""
        self._gather()
        return self._squares

    @squares.setter
    def squares(self, squares: Tensor | None) -> None:
        self._squares, self._single = squares, []

    def note(self, queries: Tensor, kv_heads: int) -> None:
        """Add the queries of the next tokens. queries: (rows, q_heads, n, head_dim), any number of tokens."""
        left = LEARN - self.tokens
        if not left:
            return
        grouped = queries.unflatten(1, (kv_heads, -1))
        if queries.shape[2] == 1:
            self._single = [*self._single, grouped.to(torch.float32, copy=True)]  # the caller may reuse its memory
        else:
            self._gather()
            self._add(grouped[:, :, :, :left])

    def _gather(self) -> None:
        if self._single:
            queries, self._single = torch.cat(self._single, 3), []
            self._add(queries)

    def _add(self, queries: Tensor) -> None:
        if queries.shape[3]:
            squares = queries.float().square().mean(2)
            self._squares = squares if self._squares is None else torch.cat((self._squares, squares), 2)

    def measure(self, keys: Tensor, partner: Sequence[int] | None) -> KeyStats:
        """Compute the statistics of all `LEARN` tokens. keys: (rows, kv_heads, n, head_dim), those to be quantised."""
        squares = self.squares
        assert squares is not None
        assert self.tokens == LEARN
        return KeyStats.measure(squares, keys, partner)

    def cut(self, tokens: int) -> None:
        """Remove all but the first `tokens`."""
        squares = self.squares
        if squares is not None:
            self.squares = squares[:, :, :tokens].clone() if tokens else None

    def select(self, rows: Tensor) -> None:
        """Take rows by index."""
        self.squares = None if self.squares is None else self.squares[upload(rows, self.squares.device)]

    def to(self, device: torch.device | str) -> None:
        """Move to another device."""
        self.squares = None if self.squares is None else self.squares.to(device)

    def buffers(self) -> list[Tensor]:
        """Every tensor that is held."""
        return [] if self.squares is None else [self.squares]
