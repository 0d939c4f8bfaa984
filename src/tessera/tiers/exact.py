"""Tiers that keep keys and values unchanged: the first tokens, and the newest."""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.devices import upload
from tessera.kernels.precision import join
from tessera.tiers.tier import BLOCK, KVSource, Pairs, Tier, whole_blocks

#: A buffer grows by at least so many tokens.
LEAST = 16


class ExactTier(Tier):
    """A tier of unchanged keys and values; where later ones have a wider dtype, all are widened to it, so that none is rounded.

    They lie at the front of a buffer with a little room behind them, so that a step of one token writes one token.
    """

    def __init__(self) -> None:
        self._tokens = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens of each sequence."""
        return self._tokens

    @property
    def keys(self) -> Tensor:
        """(batch, kv_heads, tokens, head_dim), a view."""
        assert self._keys is not None
        return self._keys.narrow(2, 0, self._tokens)

    @property
    def values(self) -> Tensor:
        """(batch, kv_heads, tokens, head_dim), a view."""
        assert self._values is not None
        return self._values.narrow(2, 0, self._tokens)

    @property
    def buffer(self) -> tuple[Tensor, Tensor, int]:
        """Keys and values with the room behind them, (batch, kv_heads, at least tokens, head_dim), and the tokens."""
        assert self._keys is not None
        assert self._values is not None
        return self._keys, self._values, self._tokens

    def buffers(self) -> list[Tensor]:
        """Every tensor that is held."""
        return [] if self._keys is None or self._values is None else [self._keys, self._values]

    def append(self, k: Tensor, v: Tensor, place: int = 0) -> Pairs | None:
        """Add tokens behind the newest. k, v: (batch, kv_heads, n, head_dim)."""
        n = k.shape[2]
        if n == 0 and self._keys is not None:
            return None
        need = self.tokens + n
        self._keys = self._write(self._keys, k, need)
        self._values = self._write(self._values, v, need)
        self._tokens = need
        return None

    def add_token(self, k: Tensor, v: Tensor) -> bool:
        """Add one token if there is room for it in the dtypes of the buffers; False: `append` has to make some.

        k, v: (batch, kv_heads, 1, head_dim).
        """
        keys, values, at = self._keys, self._values, self._tokens
        if keys is None or values is None or keys.dtype != k.dtype or values.dtype != v.dtype:
            return False
        # After calls in several dtypes or modes the two buffers may have been made at different times.
        if at >= min(keys.shape[2], values.shape[2]):
            return False
        if (keys.is_inference() or values.is_inference()) and not torch.is_inference_mode_enabled():
            return False
        keys.narrow(2, at, 1).copy_(k)
        values.narrow(2, at, 1).copy_(v)
        self._tokens = at + 1
        return True

    def _write(self, buffer: Tensor | None, new: Tensor, need: int) -> Tensor:
        # A buffer made in inference mode may not be written to outside of it.
        locked = buffer is not None and buffer.is_inference() and not torch.is_inference_mode_enabled()
        dtype = new.dtype if buffer is None else torch.promote_types(buffer.dtype, new.dtype)
        if buffer is None or buffer.shape[2] < need or buffer.dtype != dtype or locked:
            grown = new.new_empty((*new.shape[:2], self._round(need), new.shape[3]), dtype=dtype)
            if buffer is not None:
                grown[:, :, : self.tokens] = buffer[:, :, : self.tokens]
            buffer = grown
        buffer.narrow(2, self._tokens, new.shape[2]).copy_(new)  # cheaper than a slice, twice in every step
        return buffer

    def _round(self, tokens: int) -> int:
        """Number of tokens to allocate for so many: at most an eighth more, and at least `LEAST` more."""
        step = min(BLOCK, max(LEAST, tokens // 8 // LEAST * LEAST))
        return -(-tokens // step) * step

    @property
    def room(self) -> int:
        """Bytes of the buffers that hold no token yet."""
        return sum(x[:, :, self.tokens :].numel() * x.element_size() for x in self.buffers())

    def front(self, n: int) -> Pairs:
        """Keys and values of the `n` oldest tokens; what is appended or dropped later does not change them."""
        return self.keys[:, :, :n], self.values[:, :, :n]

    def drop_front(self, n: int) -> None:
        """Remove the `n` oldest tokens; the others share no memory with them."""
        keys, values = self.keys, self.values
        self._tokens -= n
        size = self._round(self.tokens + 1)
        self._keys, self._values = self._moved(keys[:, :, n:], size), self._moved(values[:, :, n:], size)

    @staticmethod
    def _moved(kept: Tensor, size: int) -> Tensor:
        buffer = kept.new_empty((*kept.shape[:2], size, kept.shape[3]))
        buffer[:, :, : kept.shape[2]] = kept
        return buffer

    def crop_back(self, n: int) -> Pairs | None:
        """Remove the `n` newest tokens."""
        self._tokens -= n
        if self._keys is not None and self._values is not None:
            size = self._round(self.tokens + 1)
            if self._keys.shape[2] > size:
                self._keys, self._values = self._moved(self.keys, size), self._moved(self.values, size)
        return None

    def push_front(self, k: Tensor, v: Tensor) -> None:
        """Put tokens before the oldest."""
        if self.tokens:
            k, v = join([k, self.keys], 2), join([v, self.values], 2)
        size = self._round(k.shape[2])
        self._tokens = k.shape[2]
        self._keys, self._values = self._moved(k, size), self._moved(v, size)

    def sources(self, start: int, window: int | None) -> list[KVSource]:
        """See `Tier`."""
        return [KVSource((self.keys, self.values), start, self.tokens, window)] if self.tokens else []

    def select(self, rows: Tensor) -> None:
        """Take batch rows by index. rows: (n,) int64."""
        if self._keys is not None and self._values is not None:
            rows = upload(rows, self._keys.device)
            self._keys, self._values = self._keys.index_select(0, rows), self._values.index_select(0, rows)

    def to(self, device: torch.device | str) -> None:
        """Move to another device."""
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys.to(device), self._values.to(device)


class SinkTier(ExactTier):
    """The first tokens of a sequence, which stay until it ends.

    Args:
        capacity: number of tokens.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    def _round(self, tokens: int) -> int:
        return max(self.capacity, tokens)

    def append(self, k: Tensor, v: Tensor, place: int = 0) -> Pairs | None:
        """Add as many tokens as there is room for; returns the rest."""
        few = min(max(self.capacity - place, 0), k.shape[2])
        if not few:
            return k, v
        super().append(k[:, :, :few], v[:, :, :few], place)
        return k[:, :, few:], v[:, :, few:]


class RecentTier(ExactTier):
    """The newest tokens.

    Args:
        capacity: number of tokens kept at least; up to `BLOCK` - 1 more wait until a block is whole. None: all.
    """

    def __init__(self, capacity: int | None) -> None:
        super().__init__()
        self.capacity = capacity

    def excess(self, spare: int) -> int:
        """See `Tier`."""
        return 0 if self.capacity is None else whole_blocks(self.tokens - self.capacity - spare)
