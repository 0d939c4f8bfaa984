"""Where tokens are kept: exact (`ExactTier`) or packed (`CodecTier`). Both hold tokens in order, the oldest first."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tessera.cache.spec import BLOCK
from tessera.codecs import Codec, Packed
from tessera.codecs.key_stats import KeyStats
from tessera.kernels import Pages
from tessera.kernels.precision import join

#: Tokens of a page of packed tokens at most.
PAGE = 1024


class ExactTier:
    """Keys and values as they came; where later ones have a wider dtype, all are widened to it, so that none is rounded.

    They lie at the front of a buffer with a little room behind them, so that a step of one token writes one token.

    Args:
        room: the buffer grows by multiples of this many tokens.
    """

    def __init__(self, room: int = BLOCK) -> None:
        self.room = room
        self.tokens = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        """(batch, kv_heads, tokens, head_dim), a view."""
        assert self._keys is not None
        return self._keys[:, :, : self.tokens]

    @property
    def values(self) -> Tensor:
        """(batch, kv_heads, tokens, head_dim), a view."""
        assert self._values is not None
        return self._values[:, :, : self.tokens]

    def buffers(self) -> list[Tensor]:
        """Every tensor that is held."""
        return [] if self._keys is None or self._values is None else [self._keys, self._values]

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add tokens behind the newest. k, v: (batch, kv_heads, n, head_dim)."""
        n = k.shape[2]
        if n == 0 and self._keys is not None:
            return
        need = self.tokens + n
        self._keys = self._write(self._keys, k, need)
        self._values = self._write(self._values, v, need)
        self.tokens = need

    def _write(self, buffer: Tensor | None, new: Tensor, need: int) -> Tensor:
        # A buffer made in inference mode may not be written to outside of it.
        locked = buffer is not None and buffer.is_inference() and not torch.is_inference_mode_enabled()
        dtype = new.dtype if buffer is None else torch.promote_types(buffer.dtype, new.dtype)
        if buffer is None or buffer.shape[2] < need or buffer.dtype != dtype or locked:
            grown = new.new_empty((*new.shape[:2], self._round(need), new.shape[3]), dtype=dtype)
            if buffer is not None:
                grown[:, :, : self.tokens] = buffer[:, :, : self.tokens]
            buffer = grown
        buffer[:, :, self.tokens : need] = new
        return buffer

    def _round(self, tokens: int) -> int:
        return -(-tokens // self.room) * self.room

    def pop_front(self, n: int) -> tuple[Tensor, Tensor]:
        """Remove the `n` oldest tokens and return them; they share no memory with what stays."""
        keys, values = self.keys, self.values
        front = keys[:, :, :n], values[:, :, :n]
        self.tokens -= n
        size = self._round(self.tokens + self.room)
        self._keys, self._values = self._moved(keys[:, :, n:], size), self._moved(values[:, :, n:], size)
        return front

    @staticmethod
    def _moved(kept: Tensor, size: int) -> Tensor:
        buffer = kept.new_empty((*kept.shape[:2], size, kept.shape[3]))
        buffer[:, :, : kept.shape[2]] = kept
        return buffer

    def pop_back(self, n: int) -> None:
        """Forget the `n` newest tokens."""
        self.tokens -= n
        if self._keys is not None and self._values is not None:
            size = self._round(self.tokens + self.room)
            if self._keys.shape[2] > size:
                self._keys, self._values = self._moved(self.keys, size), self._moved(self.values, size)

    def push_front(self, k: Tensor, v: Tensor) -> None:
        """Put tokens before the oldest."""
        if self.tokens:
            k, v = join([k, self.keys], 2), join([v, self.values], 2)
        size = self._round(k.shape[2])
        self.tokens = k.shape[2]
        self._keys, self._values = self._moved(k, size), self._moved(v, size)

    def select(self, rows: Tensor) -> None:
        """Take batch rows by index. rows: (n,) int64."""
        if self._keys is not None and self._values is not None:
            rows = rows.to(self._keys.device)
            self._keys, self._values = self._keys.index_select(0, rows), self._values.index_select(0, rows)

    def to(self, device: torch.device | str) -> None:
        """Move to another device."""
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys.to(device), self._values.to(device)


class CodecTier:
    """Keys and values in the bytes of a codec, whole blocks of `BLOCK` tokens only, in pages of `PAGE` tokens at most.

    What is appended becomes a page of its own and nothing else is touched; pages that together have `PAGE` tokens are joined.
    So a token is copied once at most after it was packed, and no room lies idle, as it would in buffers that grow.

    Args:
        codec: packs and unpacks; its group must divide `BLOCK`.
        layer: index of the layer, for codebooks drawn per layer.

    Attributes:
        stats: of the keys, by whose widths they are multiplied before they are encoded; None: they are encoded as they are.
            They are the caller's, who sets them, and are not counted here.
    """

    def __init__(self, codec: Codec, layer: int) -> None:
        if BLOCK % codec.group:
            raise ValueError(f"{codec.spec} encodes {codec.group} tokens together, which does not divide {BLOCK}")
        self.codec = codec
        self.layer = layer
        self.stats: KeyStats | None = None
        self._pages: list[tuple[Packed, Packed]] = []
        self._view: Pages | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens held."""
        return sum(keys.tokens for keys, _ in self._pages)

    @property
    def pages(self) -> list[tuple[Packed, Packed]]:
        """The pages, to be read."""
        return list(self._pages)

    @property
    def view(self) -> Pages:
        """The pages as kernels read them. There must be a token."""
        assert self._view is not None
        return self._view

    def put(self, pages: list[tuple[Packed, Packed]]) -> None:
        """Hold these pages instead."""
        self._pages, self._view = pages, self._seen(pages, self._view) if pages else None

    def _seen(self, pages: list[tuple[Packed, Packed]], before: Pages | None = None) -> Pages:
        return Pages(pages, before, self.stats)

    def buffers(self) -> list[Tensor]:
        """Every tensor that is held."""
        return [tensor for page in self._pages for packed in page for tensor in packed.tensors.values()]

    def append(self, k: Tensor, v: Tensor) -> None:
        """Encode tokens behind the newest. k, v: (batch, kv_heads, n, head_dim), n a multiple of `BLOCK`."""
        n = k.shape[2]
        assert n % BLOCK == 0
        pages = self.pages
        weights = None if self.stats is None else self.stats.weights
        done = 0
        while done < n:
            few, held = _unfinished(pages)
            size = min(PAGE - held, n - done)
            chunk = slice(done, done + size)
            coming = k[:, :, chunk]
            if self.stats is not None:
                coming = coming.float() * self.stats.widths.unsqueeze(2)
            keys = self.codec.encode(coming, "key", self.layer, weights=weights)
            keys = replace(keys, dtype=k.dtype)  # what they are to be decoded to
            values = self.codec.encode(v[:, :, chunk], "value", self.layer)
            pages.append((keys, values))
            if few and held + size == PAGE:
                keys, values = (Packed.cat(list(packed)) for packed in zip(*pages[-few - 1 :], strict=True))
                pages[-few - 1 :] = [(keys, values)]
            done += size
        self.put(pages)

    def pop_front(self, n: int) -> tuple[Tensor, Tensor]:
        """Remove the `n` oldest tokens, a multiple of `BLOCK`, and return them decoded."""
        front = self.view.decode(0, n)
        self.drop_front(n)
        return front

    def drop_front(self, n: int) -> None:
        """Forget the `n` oldest tokens, a multiple of `BLOCK`."""
        assert n % BLOCK == 0
        if not n:
            return  # so that the view, and what kernels know about it, stays
        pages = self.pages
        while n:
            keys, values = pages[0]
            if keys.tokens <= n:
                n -= keys.tokens
                del pages[0]
            else:
                pages[0] = keys.slice(n, keys.tokens).compact(), values.slice(n, values.tokens).compact()
                n = 0
        self.put(pages)

    def crop_back(self, n: int) -> tuple[Tensor, Tensor] | None:
        """Forget the `n` newest tokens.

        Returns:
            the tokens of the block that was cut, decoded, for they no longer make a whole one; None if it was cut cleanly.
        """
        rest = None
        pages = self.pages
        while n:
            keys, values = pages.pop()
            if keys.tokens <= n:
                n -= keys.tokens
                continue
            stay = keys.tokens - n
            whole = stay // BLOCK * BLOCK
            if whole:
                pages.append((keys.slice(0, whole).compact(), values.slice(0, whole).compact()))
            if stay > whole:
                rest = self._seen([(keys.slice(whole, stay), values.slice(whole, stay))]).decode()
            n = 0
        self.put(pages)
        return rest

    def select(self, rows: Tensor) -> None:
        """Take batch rows by index. rows: (n,) int64."""
        if self._pages:
            rows = rows.to(self._pages[0][0].device)
            self.put([(keys.select(rows), values.select(rows)) for keys, values in self._pages])

    def to(self, device: torch.device | str) -> None:
        """Move to another device."""
        self.put([(keys.to(device), values.to(device)) for keys, values in self._pages])


def _unfinished(pages: list[tuple[Packed, Packed]]) -> tuple[int, int]:
    """How many of the last pages have fewer than `PAGE` tokens together, and how many tokens these are."""
    few = held = 0
    for keys, _ in reversed(pages):
        if held + keys.tokens >= PAGE:
            break
        few, held = few + 1, held + keys.tokens
    return few, held
