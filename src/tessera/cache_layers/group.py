"""Groups of batch rows whose tokens came in the same slots; they have equal lengths, so each tier is one tensor."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.cache_layers.masks import Runs
from tessera.kernels import CompressedKV
from tessera.kernels.precision import join
from tessera.tiers import BLOCK, PAGE, KVSource
from tessera.tiers.chain import Chain
from tessera.tiers.policy import RetentionPolicy

#: While a cache records its past, this many more tokens stay exact, so that a crop of as many leaves no trace.
RECORDED = 512

NONE = Runs()


@dataclass(frozen=True)
class StepContext:
    """The part of one call that belongs to one group.

    Attributes:
        group: whose rows they are.
        first: place in the group of the call's first token.
        tokens: new tokens, which are also the queries.
        sources: what the queries read, each up to its own place.
        pending: the new keys and values if the group has not taken them in yet.
        queries: which of the call's tokens these are.
        hold: number of newest tokens that may still be cropped, so they are neither quantised, dropped nor written permanently.
        index: (rows,) int64 on the device of the queries, the batch rows; None: all.
    """

    group: SequenceGroup
    first: int
    tokens: int
    sources: list[KVSource]
    pending: tuple[Tensor, Tensor] | None
    queries: Runs = NONE
    hold: int = 0
    index: Tensor | None = None

    def pairs(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the places [begin, end), which are all held exactly: (rows, kv_heads, end - begin, head_dim)."""
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for source in self.sources:
            a, b = max(begin - source.start, 0), min(end - source.start, source.tokens)
            if not isinstance(source.held, CompressedKV) and (a < b or not keys):
                keys.append(source.held[0][:, :, a : max(a, b)])
                values.append(source.held[1][:, :, a : max(a, b)])
        k, v = join(keys, 2), join(values, 2)
        assert k.shape[2] == end - begin
        return k, v


class SequenceGroup:
    """The tokens of some batch rows, without their padding.

    A token's place is its number among them. Blocks of `BLOCK` tokens are counted by place, from the end of the sinks, so what
    is quantised together depends neither on padding nor on how the calls were cut.

    Args:
        policy: what to keep.
        layer: index of the layer.
        rows: batch rows, ascending.
        before: tokens of the rows' earlier documents, which are gone.

    Attributes:
        slots: slots of the tokens, by place; those of padding are not among them.
        length: number of tokens up to now, dropped ones included.
        chain: the tiers.
    """

    def __init__(self, policy: RetentionPolicy, layer: int, rows: list[int], before: int = 0) -> None:
        self.policy = policy
        self.layer = layer
        self.rows = rows
        self.before = before
        self.slots = Runs()
        self.length = 0
        self.chain = Chain(policy, layer, len(rows))

    @property
    def holds_back(self) -> bool:
        """Whether pairs that left the window at croppable queries have yet to be written to the Tensor Cache."""
        matrix = self.chain.tensor_cache
        return matrix is not None and matrix.unwritten(self.length) > 0

    @property
    def irrevocable(self) -> bool:
        """Whether some tokens are in a tier that cannot tell them apart, so that no mask can hide them."""
        chain = self.chain
        merged = any(tier.tokens and not tier.keeps_tokens for tier in chain.tiers)
        return merged or (self.policy.dissolves and chain.dropped > 0)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Store new tokens. k, v: (rows, kv_heads, n, head_dim)."""
        self.chain.append(k, v, self.length)
        self.length += k.shape[2]

    def evict_blocks(self, drop: bool = True, spare: int = 0) -> None:
        """Move whole blocks on to the next tier, see `Chain.evict_blocks`."""
        self.chain.evict_blocks(self.length, drop, spare)

    def begin_step(
        self,
        k: Tensor,
        v: Tensor,
        quantize_before_attend: bool,
        queries: Runs = NONE,
        positions: Tensor | None = None,
        hold: int = 0,
        asked: Tensor | None = None,
    ) -> StepContext:
        """Begin a call, and return what its queries read.

        Args:
            k, v: (rows, kv_heads, n, head_dim) of the new tokens.
            quantize_before_attend: quantise what leaves `recent` before the queries read it, instead of after.
            queries, hold: see `StepContext`.
            positions: (rows, n) rotary positions of the new tokens, where a Tensor Cache needs them.
            asked: (rows, q_heads, n, head_dim) queries of the new tokens; None: they are not known.
        """
        first, n, chain = self.length, k.shape[2], self.chain
        chain.learn(asked, k.shape[1])
        if chain.tensor_cache is not None:
            chain.tensor_cache.note(positions)
        if quantize_before_attend or (n <= BLOCK and first):
            self.append(k, v)
            if quantize_before_attend:
                self.evict_blocks(drop=False, spare=hold)
            return StepContext(self, first, n, chain.sources(), None, queries, hold)
        # The tokens of a long call are read where they are and stored afterwards, so they are never copied whole.
        sources, window = chain.sources(), self.policy.window
        split = min(max(self.policy.sink - first, 0), n) if window is not None else 0
        if split:
            sources.append(KVSource((k[:, :, :split], v[:, :, :split]), first, split))
        if split < n:
            sources.append(KVSource((k[:, :, split:], v[:, :, split:]), first + split, n - split, window))
        return StepContext(self, first, n, sources, (k, v), queries, hold)

    def idle_step(self) -> StepContext:
        """Begin a call that has only padding for this group."""
        return StepContext(self, self.length, 0, self.chain.sources(), None)

    def end_step(self, step: StepContext) -> None:
        """End a call: store tokens that are still pending, quantise, and drop."""
        self.chain.commit()
        if step.pending is not None:
            k, v = step.pending
            size = step.tokens if self.policy.recent is None else PAGE
            for a in range(0, step.tokens, size):
                self.append(k[:, :, a : a + size], v[:, :, a : a + size])
                self.evict_blocks(spare=step.hold)
        else:
            self.evict_blocks(spare=step.hold)
        self.chain.release()

    def check_crop(self, n: int) -> None:
        """Refuse to remove the `n` newest tokens where tokens would be needed again that have been dropped.

        Raises:
            ValueError: saying which.
        """
        if self.before and n >= self.length:
            raise ValueError(f"layer {self.layer} has dropped the document before this one; it cannot be cropped so far back")
        matrix, dropped = self.chain.tensor_cache, self.chain.dropped
        window = None if matrix is None else matrix.window
        if matrix is not None and window is not None and self.length - n < matrix.written > window + self.policy.sink:
            raise ValueError(
                f"layer {self.layer} has written what left its window of {window} tokens into its Tensor Cache, from which "
                f"nothing can be taken back, so the last {n} tokens cannot be forgotten; call "
                "cache.activate_past_recording() before the calls that may be cropped"
            )
        if not (dropped or self.irrevocable) or not n:
            return
        merged = sum(tier.tokens for tier in self.chain.aging if not tier.keeps_tokens)
        rest, oldest = self.length - n, self.chain.sink.tokens + dropped + merged
        # The next query would see window - 1 tokens before it.
        if self.policy.window is not None and rest - self.policy.window + 1 < oldest:
            raise ValueError(
                f"layer {self.layer} keeps a window of {self.policy.window} tokens and has dropped what lay before it, so "
                f"the last {n} tokens cannot be taken back; call cache.activate_past_recording() before the calls that "
                f"may be cropped (then up to {RECORDED} tokens can be)"
            )
        if rest < oldest:
            raise ValueError(f"layer {self.layer} has dropped its tokens up to {oldest}; it cannot be cropped to {rest}")

    def crop(self, n: int) -> None:
        """Remove the `n` newest tokens; see `check_crop`."""
        self.length -= n
        self.chain.crop(n, self.length)
        self.slots = self.slots.cut(0, self.length)

    def select(self, index: Tensor) -> None:
        """Keep the rows with these indices within the group. index: (n,) int64."""
        self.chain.select(index)

    def taken(self, rows: list[int]) -> SequenceGroup:
        """Return a group of some of the rows; this one is not changed."""
        other = copy.copy(self)
        other.chain = self.chain.copied()
        other.rows = rows
        other.select(torch.tensor([self.rows.index(row) for row in rows], dtype=torch.long))
        return other
