"""A tier that keeps keys and values in the bytes of a codec."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tessera.codecs import Codec, Packed, Role
from tessera.codecs.channel_stats import KeyStats
from tessera.finite import FiniteCheck
from tessera.kernels import CompressedKV
from tessera.kernels.precision import join
from tessera.tiers.offload import Store
from tessera.tiers.tier import BLOCK, KVSource, Pairs, Tier

#: Tokens of a page of packed tokens at most.
PAGE = 1024


class QuantizedTier(Tier):
    """Keys and values in the bytes of a codec, whole blocks of `BLOCK` tokens only, in pages of `PAGE` tokens at most.

    Appended tokens become a page of their own; pages that together have `PAGE` tokens are joined. So a token is copied at most
    once after it was packed, and there is no free room, as a growing buffer would have.

    Args:
        codec: packs and unpacks; its group must divide `BLOCK`.
        layer: index of the layer, for codebooks drawn per layer.
        limit: number of tokens that are held at most; None: any number.
        top: number of tokens that a query reads at most; None: all.
        store: where pages of `PAGE` tokens go; None: nowhere.
        finite: is notified of numbers that cannot be encoded; None: they are refused at once.

    Attributes:
        stats: statistics whose widths multiply the keys before encoding; None: keys are encoded as they are. The caller owns
            them, so their bytes are not counted here.
    """

    def __init__(
        self,
        codec: Codec,
        layer: int,
        limit: int | None = None,
        top: int | None = None,
        store: Store | None = None,
        finite: FiniteCheck | None = None,
    ) -> None:
        if BLOCK % codec.group:
            raise ValueError(f"{codec.spec} encodes {codec.group} tokens together, which does not divide {BLOCK}")
        self.codec = codec
        self.layer = layer
        self.limit = limit
        self.top = top
        self.stats: KeyStats | None = None
        self.store = store
        self.finite = finite
        self._pages: list[tuple[Packed, Packed]] = []
        self._views: list[CompressedKV] = []

    @property
    def tokens(self) -> int:
        """Number of tokens held."""
        return sum(view.tokens for view in self._views)

    @property
    def pages(self) -> list[tuple[Packed, Packed]]:
        """Return the pages, for reading."""
        return list(self._pages)

    @property
    def view(self) -> CompressedKV:
        """The pages as kernels read them. There must be a token, and all pages on one device."""
        (view,) = self._views
        return view

    @property
    def read_whole(self) -> CompressedKV | None:
        """The pages where they are on one device and queries read all of them; None elsewhere."""
        if len(self._views) != 1 or (self.top is not None and self.top < self.tokens):
            return None
        return self._views[0]

    def put(self, pages: list[tuple[Packed, Packed]]) -> None:
        """Hold these pages instead."""
        if self.store is not None:
            pages = [self._stored(self.store, page) for page in pages]
        before = {view.pages[0][0].device: view for view in self._views}
        devices = dict.fromkeys(keys.device for keys, _ in pages)
        views = [[page for page in pages if page[0].device == device] for device in devices]
        self._pages = pages
        self._views = [self._seen(view, before.get(device)) for view, device in zip(views, devices, strict=True)]

    @staticmethod
    def _stored(store: Store, page: tuple[Packed, Packed]) -> tuple[Packed, Packed]:
        if page[0].tokens < PAGE:  # it may yet be joined with others
            return page
        keys, values = (packed if store.holds(packed) else store.keep(packed) for packed in page)
        return keys, values

    def _seen(self, pages: list[tuple[Packed, Packed]], before: CompressedKV | None = None) -> CompressedKV:
        stats = self.stats
        if stats is not None and stats.sizes.device != pages[0][0].device:
            stats = stats.to(pages[0][0].device)
        return CompressedKV(pages, before, stats)

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
            keys = self._encode(coming, "key", weights)
            keys = replace(keys, dtype=k.dtype)  # the dtypes that decoding returns
            values = self._encode(v[:, :, chunk], "value")
            if n > BLOCK:
                keys, values = keys.complete(), values.complete()  # or the outliers of a prompt would take a dense copy
            pages.append((keys, values))
            if few and held + size == PAGE:
                keys, values = (Packed.cat(list(packed)) for packed in zip(*pages[-few - 1 :], strict=True))
                pages[-few - 1 :] = [(keys, values)]
            done += size
        self.put(pages)
        return None

    def _encode(self, x: Tensor, role: Role, weights: Tensor | None = None) -> Packed:
        # One block at a time for codecs that look at all tokens of a call, so that the result does not depend on how calls were
        # cut.
        parts = x.split(BLOCK, 2) if self.codec.side(role).by_call else (x,)
        tell = self.finite.add if self.finite is not None and self.finite.defers(x.device) else None
        packed = [self.codec.encode(part, role, self.layer, weights=weights, tell=tell) for part in parts]
        return packed[0] if len(packed) == 1 else Packed.cat(packed)

    def excess(self, spare: int) -> int:
        """See `Tier`."""
        return self.excess_of(self.tokens)

    def excess_of(self, tokens: int) -> int:
        """Count how many of `tokens` are past the limit, in whole blocks."""
        return 0 if self.limit is None else max(0, -(-(tokens - self.limit) // BLOCK) * BLOCK)

    def front(self, n: int) -> Pairs:
        """Keys and values of the `n` oldest tokens, a multiple of `BLOCK`, decoded."""
        found, device = [], self._pages[-1][0].device
        for view in self._views:
            few = min(n, view.tokens)
            if few:
                found.append([x.to(device) for x in view.decode(0, few)])
            n -= few
        return join([k for k, _ in found], 2), join([v for _, v in found], 2)

    def drop_front(self, n: int) -> None:
        """Forget the `n` oldest tokens, a multiple of `BLOCK`."""
        assert n % BLOCK == 0
        if not n:
            return  # so that the view, and the tables that kernels keep for it, stay valid
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

        Returns: the remaining tokens of the block that was cut, decoded, because they no longer fill it; None if the cut was at
        a block's end.
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
        found = []
        for view in self._views:
            # Of several, each gives its share of what is read.
            top = None if self.top is None else max(BLOCK, self.top * view.tokens // self.tokens // BLOCK * BLOCK)
            found.append(KVSource(view, start, view.tokens, window, top=top))
            start += view.tokens
        return found

    def select(self, rows: Tensor) -> None:
        """Take batch rows by index. rows: (n,) int64."""
        self.put([(keys.select(rows), values.select(rows)) for keys, values in self._pages])

    def to(self, device: torch.device | str) -> None:
        """Move to another device."""
        self.put([page if self._is_stored(page) else (page[0].to(device), page[1].to(device)) for page in self._pages])

    def _is_stored(self, page: tuple[Packed, Packed]) -> bool:
        return self.store is not None and page[0].tokens >= PAGE and all(map(self.store.holds, page))

    def copied(self) -> QuantizedTier:
        """See `Tier`."""
        other = QuantizedTier(self.codec, self.layer, self.limit, self.top, self.store, self.finite)
        other.stats = self.stats
        other.put(self.pages)
        return other


def _unfinished(pages: list[tuple[Packed, Packed]]) -> tuple[int, int]:
    """Count the last pages that have fewer than `PAGE` tokens together, and their tokens."""
    few = held = 0
    for keys, _ in reversed(pages):
        if held + keys.tokens >= PAGE:
            break
        few, held = few + 1, held + keys.tokens
    return few, held
