"""A tier that keeps keys and values in the bytes of a codec."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tessera.cache.spec import BLOCK
from tessera.cache.tiers.base import KVSource, Pairs, Tier
from tessera.codecs import Codec, Packed
from tessera.codecs.key_stats import KeyStats
from tessera.kernels import Pages

#: Tokens of a page of packed tokens at most.
PAGE = 1024


class QuantizedTier(Tier):
    """Keys and values in the bytes of a codec, whole blocks of `BLOCK` tokens only, in pages of `PAGE` tokens at most.

    What is appended becomes a page of its own and nothing else is touched; pages that together have `PAGE` tokens are joined.
    So a token is copied once at most after it was packed, and no room lies idle, as it would in buffers that grow.

    Args:
        codec: packs and unpacks; its group must divide `BLOCK`.
        layer: index of the layer, for codebooks drawn per layer.
        limit: number of tokens that are held at most; None: any number.
        top: number of tokens that a query reads at most; None: all.

    Attributes:
        stats: of the keys, by whose widths they are multiplied before they are encoded; None: they are encoded as they are.
            They are the caller's, who sets them, and are not counted here.
    """

    def __init__(self, codec: Codec, layer: int, limit: int | None = None, top: int | None = None) -> None:
        if BLOCK % codec.group:
            raise ValueError(f"{codec.spec} encodes {codec.group} tokens together, which does not divide {BLOCK}")
        self.codec = codec
        self.layer = layer
        self.limit = limit
        self.top = top
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

    def append(self, k: Tensor, v: Tensor, place: int = 0) -> Pairs | None:
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
        return None

    def excess(self, spare: int) -> int:
        """See `Tier`."""
        return self.excess_of(self.tokens)

    def excess_of(self, tokens: int) -> int:
        """How many of `tokens` are past the limit, whole blocks."""
        return 0 if self.limit is None else max(0, -(-(tokens - self.limit) // BLOCK) * BLOCK)

    def front(self, n: int) -> Pairs:
        """Keys and values of the `n` oldest tokens, a multiple of `BLOCK`, decoded."""
        return self.view.decode(0, n)

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

    def crop_back(self, n: int) -> Pairs | None:
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

    def sources(self, start: int, window: int | None) -> list[KVSource]:
        """See `Tier`."""
        return [KVSource(self.view, start, self.tokens, window, top=self.top)] if self.tokens else []

    def select(self, rows: Tensor) -> None:
        """Take batch rows by index. rows: (n,) int64."""
        if self._pages:
            rows = rows.to(self._pages[0][0].device)
            self.put([(keys.select(rows), values.select(rows)) for keys, values in self._pages])

    def to(self, device: torch.device | str) -> None:
        """Move to another device."""
        self.put([(keys.to(device), values.to(device)) for keys, values in self._pages])

    def copied(self) -> QuantizedTier:
        """See `Tier`."""
        other = QuantizedTier(self.codec, self.layer, self.limit, self.top)
        other.stats = self.stats
        other.put(self.pages)
        return other


def _unfinished(pages: list[tuple[Packed, Packed]]) -> tuple[int, int]:
    """How many of the last pages have fewer than `PAGE` tokens together, and how many tokens these are."""
    few = held = 0
    for keys, _ in reversed(pages):
        if held + keys.tokens >= PAGE:
            break
        few, held = few + 1, held + keys.tokens
    return few, held
