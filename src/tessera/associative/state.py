"""The state of a Tensor Cache: what a stream carries from one call to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tessera.state import State


@dataclass(frozen=True, eq=False)
class TensorCacheState(State):
    """See `State`.

    Attributes:
        a: (batch, heads · slots, head_dim, head_dim) float32, the matrices.
        slow: of the same shape, the second timescale, or None.
        z: (batch, heads · slots, head_dim, 1) float32, sums of keys, or None.
        k, v: (batch, heads, n, head_dim), the newest n <= window pairs, which have not been written yet.
        live: (batch, n) bool, which of them will be: not padding and not sinks.
        seen: (batch,) int64, tokens of each row so far, padding not counted.
    """

    OWNER: ClassVar[str] = "a Tensor Cache"
    KIND: ClassVar[str] = "tensor_cache_state"
    OPTIONAL: ClassVar[frozenset[str]] = frozenset({"slow", "z"})
    # Pairs of a row that begins anew stay in their slots and are never written.
    UNMARKED: ClassVar[frozenset[str]] = frozenset({"k", "v"})

    a: Tensor
    slow: Tensor | None
    z: Tensor | None
    k: Tensor
    v: Tensor
    live: Tensor
    seen: Tensor
