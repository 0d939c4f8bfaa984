"""The state of a Tensor Memory, which a stream keeps from one call to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tessera.state import State


@dataclass(frozen=True, eq=False)
class TensorMemoryState(State):
    """See `State`. Chunks begin at the same token in all rows: `reset` sets the waiting tokens of a row to zero.

    Attributes:
        h, c: (batch, channels, *grid) float32, hidden and cell.
        waiting: (batch, n, dim) float32, the newest n < chunk tokens, whose chunk is not whole and has not been written.
        places: (batch, n, axes) float32, the places of the waiting tokens, for anchored coordinates; else None.
    """

    OWNER: ClassVar[str] = "a Tensor Memory"
    KIND: ClassVar[str] = "tensor_memory_state"
    OPTIONAL: ClassVar[frozenset[str]] = frozenset({"places"})

    h: Tensor
    c: Tensor
    waiting: Tensor
    places: Tensor | None = None

    def check(self) -> None:
        """See `State.check`."""
        super().check()
        h, c = tuple(self.h.shape), tuple(self.c.shape)
        if h != c or not 3 <= len(h) <= 5 or 0 in h[1:]:
            raise ValueError(f"h and c are (batch, channels, one to three axes of cells), got {h} and {c}")
        if self.waiting.ndim != 3 or not self.waiting.shape[2]:
            raise ValueError(f"waiting is (batch, tokens, dim), got {tuple(self.waiting.shape)}")
        self.check_shapes(places=(*self.waiting.shape[:2], len(h) - 2))
