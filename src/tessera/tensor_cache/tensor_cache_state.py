"""The state of a Tensor Cache, which a stream keeps from one call to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tessera.state import MODEL_DTYPES, State

#: No stream has seen more tokens.
MOST = 1 << 40


@dataclass(frozen=True, eq=False)
class TensorCacheState(State):
    """See `State`.

    Attributes:
        a: (batch, heads · slots, head_dim, head_dim) float32, the matrices.
        slow: matrices of the second timescale, of the same shape, or None.
        z: (batch, heads · slots, head_dim, 1) float32, sums of keys, or None.
        k, v: (batch, heads, n, head_dim), the newest n <= window pairs, which have not been written yet.
        live: (batch, n) bool, which of them will be written: neither padding nor sinks.
        seen: (batch,) int64, tokens of each row so far, padding not counted.
    """

    OWNER: ClassVar[str] = "a Tensor Cache"
    KIND: ClassVar[str] = "tensor_cache_state"
    OPTIONAL: ClassVar[frozenset[str]] = frozenset({"slow", "z"})
    # After a row is reset its pairs stay in their slots and are never written.
    UNMARKED: ClassVar[frozenset[str]] = frozenset({"k", "v"})
    DTYPES: ClassVar[dict[str, tuple[torch.dtype, ...]]] = {
        "k": MODEL_DTYPES,
        "v": MODEL_DTYPES,
        "live": (torch.bool,),
        "seen": (torch.int64,),
    }

    a: Tensor
    slow: Tensor | None
    z: Tensor | None
    k: Tensor
    v: Tensor
    live: Tensor
    seen: Tensor

    def check(self) -> None:
        """See `State.check`."""
        super().check()
        if self.a.ndim != 4 or self.k.ndim != 4 or 0 in self.a.shape[1:] or not self.k.shape[1]:
            raise ValueError(f"a {tuple(self.a.shape)} and k {tuple(self.k.shape)} are no matrices and keys of heads")
        batch, matrices, dim, _ = self.a.shape
        _, heads, waiting, _ = self.k.shape
        if matrices % heads:
            raise ValueError(f"{matrices} matrices do not belong to {heads} heads")
        square, pairs = (batch, matrices, dim, dim), (batch, heads, waiting, dim)
        self.check_shapes(a=square, slow=square, z=(*square[:3], 1), k=pairs, v=pairs, live=(batch, waiting), seen=(batch,))
        if not bool(((self.seen >= self.live.sum(1)) & (self.seen <= MOST)).all()):
            raise ValueError(f"seen must count the tokens of each row, of which some wait, got {self.seen[:8].tolist()}")
