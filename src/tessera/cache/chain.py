"""The compressed tiers of a group, one behind the other: what one lets go the next takes in, and the last one's is dropped.

Tokens pass from tier to tier in whole blocks, the oldest first, decoded by the one and encoded by the next. Which tier a token
is in depends on how many tokens have come behind it and on nothing else, so neither on how calls were cut nor on other rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.cache.spec import BLOCK
from tessera.cache.tiers import CodecTier
from tessera.codecs import Codec, Packed
from tessera.codecs.key_stats import KeyStats
from tessera.kernels import Pages


class Chain:
    """Compressed tokens, the newest in the first tier.

    Args:
        codecs: of the tiers, each with the number of tokens that it holds at most; None: any number.
        layer: index of the layer, for codebooks drawn per layer.
    """

    def __init__(self, codecs: Sequence[tuple[Codec, int | None]], layer: int) -> None:
        self.tiers = [CodecTier(codec, layer) for codec, _ in codecs]
        self.limits = [limit for _, limit in codecs]
        self._stats: KeyStats | None = None

    @property
    def stats(self) -> KeyStats | None:
        """Of the keys, for the codecs that use them; set while there is no token."""
        return self._stats

    @stats.setter
    def stats(self, stats: KeyStats | None) -> None:
        self._stats = stats
        for tier in self.tiers:
            tier.stats = stats if tier.codec.weighs else None

    @property
    def weighing(self) -> int:
        """The number of the first tier that sees keys as queries do, to which statistics are booked; 0 if none does."""
        return next((number for number, tier in enumerate(self.tiers) if tier.codec.weighs), 0)

    @property
    def tokens(self) -> int:
        """Number of tokens held."""
        return sum(tier.tokens for tier in self.tiers)

    @property
    def pages(self) -> list[tuple[Packed, Packed]]:
        """The pages of all tiers, the oldest tokens first."""
        return [page for tier in reversed(self.tiers) for page in tier.pages]

    @property
    def views(self) -> list[Pages]:
        """What kernels read of each tier that holds tokens, the oldest tokens first."""
        return [tier.view for tier in reversed(self.tiers) if tier.tokens]

    def buffers(self) -> list[list[Tensor]]:
        """Every tensor that is held, tier by tier."""
        found = [tier.buffers() for tier in self.tiers]
        if self._stats is not None:
            found[self.weighing].append(self._stats.sizes)
        return found

    def append(self, k: Tensor, v: Tensor) -> None:
        """Take tokens in. k, v: (batch, kv_heads, n, head_dim), n a multiple of `BLOCK`."""
        if self._stats is not None and self._stats.sizes.device != k.device:
            self.stats = self._stats.to(k.device)  # given, and on the CPU until now
        self.tiers[0].append(k, v)

    def pass_on(self) -> None:
        """Let what exceeds the limit of a tier go to the next; of the last, `excess` says what is to be dropped."""
        for tier, following, limit in zip(self.tiers, self.tiers[1:], self.limits, strict=False):
            over = 0 if limit is None else _blocks(tier.tokens - limit)
            if over:
                following.append(*tier.pop_front(over))

    def excess(self, coming: int = 0) -> int:
        """Tokens past the limit of the last tier, whole blocks, if `coming` more were in it."""
        limit = self.limits[-1]
        return 0 if limit is None else _blocks(self.tiers[-1].tokens + coming - limit)

    def pop_front(self, n: int) -> tuple[Tensor, Tensor]:
        """Remove the `n` oldest tokens, all of them in the last tier and a multiple of `BLOCK`, and return them decoded."""
        return self.tiers[-1].pop_front(n)

    def drop_front(self, n: int) -> None:
        """Forget the `n` oldest tokens, a multiple of `BLOCK`."""
        for tier in reversed(self.tiers):
            few = min(n, tier.tokens)
            tier.drop_front(few)
            n -= few

    def crop_back(self, n: int) -> tuple[Tensor, Tensor] | None:
        """Forget the `n` newest tokens.

        Returns:
            the tokens of the block that was cut, decoded, for they no longer make a whole one; None if it was cut cleanly.
        """
        rest = None
        for tier in self.tiers:
            few = min(n, tier.tokens)
            rest = tier.crop_back(few) if few else rest
            n -= few
        return rest

    def select(self, rows: Tensor) -> None:
        """Take batch rows by index. rows: (n,) int64."""
        self.stats = None if self._stats is None else self._stats.select(rows)
        for tier in self.tiers:
            tier.select(rows)

    def to(self, device: torch.device | str) -> None:
        """Move to another device."""
        self.stats = None if self._stats is None else self._stats.to(device)
        for tier in self.tiers:
            tier.to(device)

    def copied(self) -> Chain:
        """The same tokens, of which rows may be taken here while there they stay; both share memory until then."""
        other = Chain([(tier.codec, limit) for tier, limit in zip(self.tiers, self.limits, strict=True)], self.tiers[0].layer)
        other.stats = self._stats
        for tier, own in zip(self.tiers, other.tiers, strict=True):
            own.put(tier.pages)
        return other


def _blocks(tokens: int) -> int:
    """As many tokens or more, whole blocks; 0 for none or fewer."""
    return max(0, -(-tokens // BLOCK) * BLOCK)
