"""The tiers of some sequences in a chain: tokens that leave one tier go to the next, and those that leave the last are dropped.

    tokens -> sink -> recent -> hqmq:4 @ 32768 -> hqmq:3 @ 131072 -> tc

Tokens move from tier to tier in whole blocks, the oldest first, decoded by one and encoded by the next. Which tier holds a
token depends only on how many tokens came after it, not on how calls were cut or on other rows.
"""

from __future__ import annotations

import copy
from itertools import zip_longest

import torch
from torch import Tensor

from tessera.codecs.channel_stats import KeyStats
from tessera.kernels import CompressedKV
from tessera.tiers import BLOCK, KVSource, QuantizedTier, RecentTier, SinkTier, TensorCacheTier, Tier
from tessera.tiers.added_tiers import make
from tessera.tiers.learning import LEARN, Learning
from tessera.tiers.policy import RetentionPolicy
from tessera.tiers.tier import whole_blocks


class Chain:
    """The tiers of sequences of equal length.

    Args:
        policy: what to keep.
        layer: index of the layer, for codebooks drawn per layer.
        rows: number of sequences.

    Attributes:
        sink, recent: the exact tiers.
        quantized: the tiers with codecs, that of the newest tokens first.
        others: tiers that were added to the grammar, behind the codecs.
        tensor_cache: the last tier, or None.
        dropped: how many tokens behind the sinks are in no tier any more.
        learning: the statistics still being collected, during which nothing is quantised; None: they are complete, or cannot be
            collected.
    """

    def __init__(self, policy: RetentionPolicy, layer: int, rows: int) -> None:
        self.policy = policy
        self.sink = SinkTier(policy.sink)
        self.recent = RecentTier(policy.recent)
        tops = policy.tops or (None,) * len(policy.codecs)
        self.quantized = [
            QuantizedTier(codec, layer, limit, top, policy.store, policy.finite)
            for (codec, limit), top in zip(policy.codecs, tops, strict=True)
        ]
        self.others: list[tuple[str, Tier]] = [(word, make(word)) for word in policy.others]
        self.tensor_cache: TensorCacheTier | None = None
        if policy.tensor_cache:
            self.tensor_cache = TensorCacheTier(None if policy.dissolves else policy.window)
        self.dropped = 0
        #: Tokens leave `recent` for codecs that take any number, and nothing else ever leaves anything.
        self._only_quantises = policy.window is None and not any(
            (policy.limited, self.others, self.tensor_cache, len(self.quantized) > 1)
        )
        self.learning: Learning | None = None
        self._stats: KeyStats | None = None
        if policy.weighs:
            if policy.stats is None:
                self.learning = Learning()
            else:
                self.stats = policy.stats.select(torch.zeros(rows, dtype=torch.long))

    @property
    def aging(self) -> list[Tier]:
        """The tiers behind `recent`, that of the newest tokens first."""
        return [*self.quantized, *(tier for _, tier in self.others)]

    @property
    def tiers(self) -> list[Tier]:
        """All tiers in the order in which a token passes them."""
        last = [] if self.tensor_cache is None else [self.tensor_cache]
        return [self.sink, self.recent, *self.aging, *last]

    def _named(self) -> dict[str, Tier]:
        """The tiers that hold tokens, by the names that reports use."""
        aged = {tier_name(number): tier for number, tier in enumerate(self.quantized)}
        return {"sink": self.sink, **aged, **dict(self.others), "recent": self.recent}

    @property
    def held(self) -> dict[str, int]:
        """Tokens of a sequence by tier."""
        return {name: tier.tokens for name, tier in self._named().items()}

    def buffers(self) -> dict[str, list[Tensor]]:
        """Every tensor that is held, by tier."""
        found = {name: tier.buffers() for name, tier in self._named().items()}
        if self.quantized:
            # Statistics are booked to the first tier that sees keys as queries do.
            weighing = next((number for number, tier in enumerate(self.quantized) if tier.codec.weighs), 0)
            found[tier_name(weighing)] += [] if self._stats is None else [self._stats.sizes]
            found[tier_name(weighing)] += [] if self.learning is None else self.learning.buffers()
        if self.tensor_cache is not None:
            found["recent"] += [] if self.tensor_cache.positions is None else [self.tensor_cache.positions]
            found["tc"] = self.tensor_cache.buffers()
        return found

    @property
    def set_aside(self) -> int:
        """Bytes that hold no key or value: free room of buffers, and statistics while they are being collected."""
        learning = [] if self.learning is None else self.learning.buffers()
        return self.sink.room + self.recent.room + sum(x.numel() * x.element_size() for x in learning)

    def sources(self) -> list[KVSource]:
        """Everything that queries can read, in order."""
        # Sinks stay visible outside the window; a layer whose own window hides them has none.
        found, start = self.sink.sources(0, None), self.sink.tokens + self.dropped
        for tier in (*reversed(self.aging), self.recent):
            found += tier.sources(start, self.policy.window)
            start += tier.tokens
        return found

    # How tokens move through the tiers

    def append(self, k: Tensor, v: Tensor, place: int) -> None:
        """Add new tokens. k, v: (rows, kv_heads, n, head_dim); place: place of the first of them."""
        for tier in (self.sink, self.recent):
            rest = tier.append(k, v, place)
            if rest is None:
                return
            place += k.shape[2] - rest[0].shape[2]
            k, v = rest

    def add_token(self, k: Tensor, v: Tensor) -> bool:
        """Add one token to `recent` if it has room and nothing is passed on then; False: nothing was done.

        k, v: (rows, kv_heads, 1, head_dim).
        """
        recent = self.recent
        if not self._only_quantises or self.sink.tokens < self.sink.capacity:
            return False
        if recent.capacity is not None and recent.tokens + 1 >= recent.capacity + BLOCK:
            return False
        return recent.add_token(k, v)

    def readable(self) -> tuple[list[tuple[Tensor, Tensor, int]], CompressedKV | None] | None:
        """Return all that a chain holds for which `add_token` succeeded.

        Returns:
            the buffers of the exact tiers, each with the number of its tokens, and the pages of the codec; None: these are on
            several devices, or are to be read only in part.
        """
        assert self._only_quantises
        exact = [tier.buffer for tier in (self.sink, self.recent) if tier.tokens]
        if not self.quantized or not self.quantized[0].tokens:
            return exact, None
        pages = self.quantized[0].read_whole
        return None if pages is None else (exact, pages)

    def evict_blocks(self, length: int, drop: bool = True, spare: int = 0) -> None:
        """Move whole blocks on to the next tier.

        Args:
            length: length of the sequences.
            drop: also remove what no later query sees and what exceeds the last limit, and move tokens from codec to codec; if
                False, only `recent` passes tokens on, to be quantised.
            spare: how many more tokens stay exact.
        """
        if self._only_quantises and not self.recent.excess(spare):
            return  # as at nearly every step
        if self.tensor_cache is not None:
            # Pairs that left at queries which may still be cropped are written later, so they are still needed.
            spare = max(spare, self.tensor_cache.unwritten(length))
        way = self.tiers[1:]
        for tier, following in zip_longest(way, way[1:]):
            if not drop and not isinstance(following, QuantizedTier):
                return
            count = tier.excess(spare)
            if count and following is None:
                self._drop(tier, count)
            elif count and following.ready and self._learned(length, spare):
                self._pass_on(tier, following, count, length - spare, drop)
            if not drop:
                return
        self._drop_unseen(length - spare)

    def _pass_on(self, tier: Tier, following: Tier, count: int, length: int, drop: bool) -> None:
        useless = 0
        if drop and following is self.tiers[-1] and isinstance(following, QuantizedTier) and tier is self.recent:
            # What would be dropped at once is not encoded first.
            held = following.tokens
            gone = max(following.excess_of(held + count), self._unseen(length, held + count))
            useless = max(0, gone - held)
            if useless:
                self._drop(following, held)
        k, v = tier.front(count)
        if self._stats is not None and self._stats.sizes.device != k.device:
            self.stats = self._stats.to(k.device)  # given, and on the CPU until now
        # Encode before removing: if encoding fails, on NaN above all, the tokens stay where they are.
        following.append(k[:, :, useless:], v[:, :, useless:], self.sink.tokens + self.dropped + useless)
        tier.drop_front(count)
        self.dropped += count if following is self.tensor_cache else useless

    def _drop(self, tier: Tier, count: int) -> None:
        tier.drop_front(count)
        self.dropped += count

    def _unseen(self, length: int, aged: int) -> int:
        """Count, in whole blocks, the oldest of `aged` tokens behind `recent` that no query from place `length` on sees."""
        if self.policy.window is None:
            return 0
        # The query at place `length` sees places greater than length - window.
        return whole_blocks(min(length - self.policy.window + 1 - self.sink.tokens - self.dropped, aged))

    def _drop_unseen(self, length: int) -> None:
        unseen = self._unseen(length, sum(tier.tokens for tier in self.aging))
        for tier in reversed(self.aging):
            few = min(unseen, tier.tokens)
            if few:
                self._drop(tier, few)
            unseen -= few

    def commit(self) -> None:
        """Make the writes of the call that ended, into the Tensor Cache, permanent."""
        if self.tensor_cache is not None:
            self.tensor_cache.commit()

    def release(self) -> None:
        """Finish the end of a call: remove positions of tokens that are gone, and the writer of the Tensor Cache."""
        if self.tensor_cache is not None:
            self.tensor_cache.keep_positions(self.recent.tokens + sum(tier.tokens for tier in self.aging))
            self.tensor_cache.absorb = None

    # Statistics of keys, which the codecs share

    @property
    def stats(self) -> KeyStats | None:
        """Statistics of the keys, for the codecs that use them; they may be set only while these codecs hold no token."""
        return self._stats

    @stats.setter
    def stats(self, stats: KeyStats | None) -> None:
        self._stats = stats
        for tier in self.quantized:
            tier.stats = stats if tier.codec.weighs else None

    def learn(self, queries: Tensor | None, kv_heads: int) -> None:
        """Collect statistics of the queries of new tokens.

        Args:
            queries: (rows, q_heads, n, head_dim); None: the attention function does not pass them, so keys are packed as they
                are.
            kv_heads: number of key heads.
        """
        if self.learning is not None and queries is None:
            self.learning = None
        elif self.learning is not None and queries is not None:
            self.learning.note(queries, kv_heads)

    def _learned(self, length: int, spare: int) -> bool:
        """Whether blocks may be quantised; completes the statistics once none of their tokens can be cropped."""
        if self.learning is None:
            return True
        enough = max(LEARN, self.policy.sink + BLOCK)
        if length - spare < enough:
            return False
        # Sinks are not quantised, and differ from other tokens, so they do not count.
        keys = self.recent.keys[:, :, : enough - self.policy.sink]
        self.stats, self.learning = self.learning.measure(keys, self.policy.partner), None
        return True

    # Changes of the length and of the rows

    def crop(self, n: int, rest: int) -> None:
        """Remove the `n` newest tokens; `rest` remain."""
        left = n
        for tier in (self.recent, *self.aging, self.sink):
            few = min(left, tier.tokens)
            block = tier.crop_back(few) if few else None
            if block is not None:
                self.recent.push_front(*block)
            left -= few
        if self.tensor_cache is not None:
            self.tensor_cache.crop(n, rest)
        if self.learning is not None:
            self.learning.cut(rest)

    def select(self, index: Tensor) -> None:
        """Take sequences by index. index: (n,) int64."""
        self.stats = None if self._stats is None else self._stats.select(index)
        for tier in self.tiers:
            tier.select(index)
        if self.learning is not None:
            self.learning.select(index)

    def to(self, device: torch.device | str) -> None:
        """Move to another device."""
        self.stats = None if self._stats is None else self._stats.to(device)
        for tier in self.tiers:
            tier.to(device)
        if self.learning is not None:
            self.learning.to(device)

    def copied(self) -> Chain:
        """Return a copy whose rows can be selected without changing this one; both share memory until then."""
        other = copy.copy(self)
        other.sink, other.recent, other.learning = self.sink.copied(), self.recent.copied(), copy.copy(self.learning)
        other.quantized = [tier.copied() for tier in self.quantized]
        other.others = [(name, tier.copied()) for name, tier in self.others]
        other.tensor_cache = None if self.tensor_cache is None else self.tensor_cache.copied()
        return other


def tier_name(number: int) -> str:
    """Name the quantised tier of this number."""
    return f"quantized.{number}" if number else "quantized"
