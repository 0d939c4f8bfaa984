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
    """Statistics of the first tokens' queries, kept token by token, so that a crop can remove them.

    Attributes:
        squares: (rows, kv_heads, n, head_dim) float32, means over the query heads of a key head; None: no token yet.
    """

    def __init__(self) -> None:
        self.squares: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens whose queries have been collected."""
        return 0 if self.squares is None else self.squares.shape[2]

    def note(self, queries: Tensor, kv_heads: int) -> None:
        """Add the queries of the next tokens. queries: (rows, q_heads, n, head_dim), any number of tokens."""
        few = queries[:, :, : LEARN - self.tokens].float()
        rows, _, n, dim = few.shape
        if n:
            squares = few.square().view(rows, kv_heads, -1, n, dim).mean(2)
            self.squares = squares if self.squares is None else torch.cat((self.squares, squares), 2)

    def measure(self, keys: Tensor, partner: Sequence[int] | None) -> KeyStats:
        """Compute the statistics of all `LEARN` tokens. keys: (rows, kv_heads, n, head_dim), those to be quantised."""
        assert self.squares is not None
        assert self.tokens == LEARN
        return KeyStats.measure(self.squares, keys, partner)

    def cut(self, tokens: int) -> None:
        """Remove all but the first `tokens`."""
        if self.squares is not None:
            self.squares = self.squares[:, :, :tokens].clone() if tokens else None

    def select(self, rows: Tensor) -> None:
        """Take rows by index."""
        self.squares = None if self.squares is None else self.squares[upload(rows, self.squares.device)]

    def to(self, device: torch.device | str) -> None:
        """Move to another device."""
        self.squares = None if self.squares is None else self.squares.to(device)

    def buffers(self) -> list[Tensor]:
        """Every tensor that is held."""
        return [] if self.squares is None else [self.squares]
