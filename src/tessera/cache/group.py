"""A group: the tiers of those batch rows whose tokens came in the same slots, and a token's way through them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tessera.cache.chain import Chain
from tessera.cache.learning import LEARN, Learning
from tessera.cache.masks import Runs
from tessera.cache.spec import BLOCK, Spec
from tessera.cache.tiers import PAGE, ExactTier
from tessera.codecs import Codec
from tessera.codecs.key_stats import KeyStats
from tessera.kernels import Pages
from tessera.kernels.precision import join
from tessera.tensor_cache import TensorCache, TensorCacheState

#: While a cache records its past, this many more tokens stay exact, so that a crop of as many leaves no trace.
RECORDED = 512


@dataclass(frozen=True)
class RetentionPolicy:
    """What a layer keeps, made from the spec and from what the model's layer can see.

    Attributes:
        sink: number of first tokens kept for ever.
        recent: number of newest tokens kept exactly; None: all.
        codecs: for the tokens in between, from the newest to the oldest, each with the number of tokens that it holds at most
            or None; where there are none the tokens are dropped.
        window: a query sees only this many newest tokens, itself included, and the sinks; None: all that are kept.
        tensor_cache: what leaves the window, or the last codec, is written into the model's Tensor Cache.
        masked: the window is that of the model's own layer, so that the model's mask has it already.
        by_document: a document that the mask sets apart begins anew, as it would alone; the window and the sinks are its own.
        stats: how the codec is to see keys, if that was given; None: what the first tokens tell, if the codec weighs at all.
        partner: of each channel of the keys the one that a rotary embedding turns it into; None: nowhere.
    """

    sink: int
    recent: int | None
    codecs: tuple[tuple[Codec, int | None], ...]
    window: int | None
    tensor_cache: bool = False
    masked: bool = False
    by_document: bool = False
    stats: KeyStats | None = None
    partner: tuple[int, ...] | None = None

    @staticmethod
    def of(
        spec: Spec,
        codecs: tuple[Codec, ...],
        sliding: int | None,
        memory: bool = True,
        stats: KeyStats | None = None,
        partner: tuple[int, ...] | None = None,
    ) -> RetentionPolicy:
        """What a layer keeps.

        Args:
            spec: of the cache.
            codecs: of the spec, in its order.
            sliding: tokens that the layer's own attention sees; None: all.
            memory: whether "tc" has given the layer an Tensor Cache.
            stats, partner: see `RetentionPolicy`.
        """
        window = min((w for w in (spec.window, sliding) if w is not None), default=None)
        if spec.tensor_cache and sliding is not None:
            window = sliding  # a layer that forgets by itself is bounded already; it gets no memory and stays as it is
        # What lies outside a layer's own window it never sees, so sinks would be of no use to it.
        sink = 0 if sliding is not None else spec.sink
        recent: int | None = None if spec.dense else spec.recent
        if window is not None:
            recent = window - 1 if spec.window is not None or recent is None else min(recent, window - 1)
        tensor_cache = spec.tensor_cache and sliding is None and memory
        if tensor_cache and window is not None:
            recent = window  # the pair that leaves at a step is still needed, to be written
        masked = sliding is not None and window == sliding
        by_document = spec.window is not None and sliding is None
        limits = [limit for _, limit in spec.codecs]
        if spec.tensor_cache and sliding is not None and limits:
            limits[-1] = None  # likewise: what a memory would have absorbed elsewhere is kept while the layer sees it
        limited = tuple(zip(codecs, limits, strict=True))
        if not any(codec.weighs for codec in codecs):
            stats = None
        return RetentionPolicy(sink, recent, limited, window, tensor_cache, masked, by_document, stats, partner)

    @property
    def weighs(self) -> bool:
        """Whether a codec sees keys as queries do."""
        return any(codec.weighs for codec, _ in self.codecs)

    @property
    def dissolves(self) -> bool:
        """Whether the Tensor Cache is behind codecs, which give it whole blocks of what they held."""
        return self.tensor_cache and bool(self.codecs)

    @property
    def limited(self) -> bool:
        """Whether codecs drop tokens that are too many for them."""
        return bool(self.codecs) and self.codecs[-1][1] is not None


@dataclass(frozen=True)
class KVSource:
    """Neighbouring tokens that attention reads in one go.

    Attributes:
        held: packed, or keys and values (rows, kv_heads, tokens, head_dim).
        start: place of the first of them in the group.
        tokens: how many.
        window: a query sees only this many newest tokens of them, itself included; None: no such rule.
    """

    held: Pages | tuple[Tensor, Tensor]
    start: int
    tokens: int
    window: int | None = None


NONE = Runs()


def tier_name(number: int) -> str:
    """What the codec of this number is called among the tiers of a group."""
    return f"packed.{number}" if number else "packed"


@dataclass(frozen=True)
class StepContext:
    """One call's share of a group.

    Attributes:
        group: whose rows they are.
        first: place in the group of the call's first token.
        tokens: new tokens, which are also the queries.
        sources: what the queries read, each up to its own place.
        pending: the new keys and values if the group has not taken them in yet.
        queries: which of the call's tokens these are.
        hold: so many of the newest tokens may still be taken back, so they are neither packed, dropped nor written for good.
    """

    group: SequenceGroup
    first: int
    tokens: int
    sources: list[KVSource]
    pending: tuple[Tensor, Tensor] | None
    queries: Runs = NONE
    hold: int = 0


class GroupMemory:
    """The Tensor Cache of a group's rows.

    Attributes:
        state: what has been written for good, or None.
        written: the queries of all places before this one have had what left at them written into `state`.
        positions: (rows, n) int64, rotary positions of the newest n tokens of the group; None: nobody needs them.
        absorb: behind codecs, within a call only: given keys and values (rows, kv_heads, n, head_dim) that leave for good, and
            the place of the first, writes them; None: whoever can is not there, so nothing leaves.
    """

    def __init__(self) -> None:
        self.absorb: Callable[[Tensor, Tensor, int], None] | None = None
        self.state: TensorCacheState | None = None
        self.written = 0
        self.positions: Tensor | None = None
        self._coming: tuple[TensorCacheState, int] | None = None  # of a call that has not ended yet

    def state_for(self, memory: TensorCache, pairs: Tensor) -> TensorCacheState:
        """What has been written, or a state with nothing in it. pairs: (rows, ...)."""
        return memory.initial_state(pairs.shape[0], pairs[:, :, :0]) if self.state is None else self.state

    def propose(self, state: TensorCacheState, written: int) -> None:
        """What `state` and `written` shall be when the call ends."""
        self._coming = replace(state.detach(), seen=torch.full_like(state.seen, written)), written

    def commit(self) -> None:
        """The call has ended: what it wrote counts."""
        if self._coming is not None:
            (self.state, self.written), self._coming = self._coming, None

    def note(self, positions: Tensor | None) -> None:
        """Positions of the tokens that come, (rows, n)."""
        if positions is not None:
            # A copy in any case: what the caller gave is written anew for its next call, as likely as not.
            known = positions[:, :0] if self.positions is None else self.positions.to(positions.device)
            self.positions = torch.cat((known, positions), dim=1)

    def places(self, begin: int, end: int, length: int) -> Tensor | None:
        """Positions of the places [begin, end) of a group of `length` tokens, (rows, n); 0 where they are not known."""
        if self.positions is None:
            return None
        first = length - self.positions.shape[1]
        known = self.positions[:, max(0, begin - first) : max(0, end - first)]
        return torch.nn.functional.pad(known, (end - begin - known.shape[1], 0))

    def keep(self, tokens: int) -> None:
        """Forget the positions of all but the newest `tokens`."""
        if self.positions is not None and self.positions.shape[1] > tokens:
            self.positions = self.positions[:, self.positions.shape[1] - tokens :].clone()

    def forget(self, tokens: int, rest: int) -> None:
        """Forget the newest `tokens`; `rest` remain in the group."""
        self.written = min(self.written, rest)
        if self.positions is not None:
            self.positions = self.positions[:, : max(0, self.positions.shape[1] - tokens)].clone()

    def buffers(self) -> list[Tensor]:
        """Every tensor of what has been written."""
        return [] if self.state is None else [t for t in self.state.tensors().values() if t.numel()]

    def select(self, index: Tensor) -> None:
        """Take rows by index."""
        self.state = None if self.state is None else self.state.select(index)
        self.positions = None if self.positions is None else self.positions[index.to(self.positions.device)]

    def to(self, device: torch.device | str) -> None:
        """Move to another device."""
        self.state = None if self.state is None else self.state.to(device)
        self.positions = None if self.positions is None else self.positions.to(device)


class SequenceGroup:
    """The tokens of some batch rows, without their padding.

    A token's place is its number among them. Blocks of `BLOCK` tokens are counted by place, from the end of the sinks, so what
    is packed together depends neither on padding nor on how the calls were cut.

    Args:
        policy: what to keep.
        layer: index of the layer.
        rows: batch rows, ascending.
        before: tokens of the rows' earlier documents, which are gone.

    Attributes:
        slots: of the tokens, by place; those of padding are not among them.
        length: number of tokens up to now, dropped ones included.
        dropped: how many tokens behind the sinks are gone.
    """

    def __init__(self, policy: RetentionPolicy, layer: int, rows: list[int], before: int = 0) -> None:
        self.policy = policy
        self.layer = layer
        self.rows = rows
        self.before = before
        self.slots = Runs()
        self.length = 0
        self.dropped = 0
        self.sink = ExactTier(room=max(1, policy.sink))
        self.recent = ExactTier()
        self.quantized = Chain(policy.codecs, layer) if policy.codecs else None
        self.memory = GroupMemory() if policy.tensor_cache else None
        #: While it is there nothing is packed; None: what there is to learn is known, or cannot be.
        self.learning: Learning | None = None
        if self.quantized is not None and policy.weighs:
            if policy.stats is None:
                self.learning = Learning()
            else:
                self.quantized.stats = policy.stats.select(torch.zeros(len(rows), dtype=torch.long))

    @property
    def held(self) -> dict[str, int]:
        """Tokens by tier."""
        packed = [0] if self.quantized is None else [tier.tokens for tier in self.quantized.tiers]
        named = {tier_name(number): tokens for number, tokens in enumerate(packed)}
        return {"sink": self.sink.tokens, **named, "recent": self.recent.tokens}

    @property
    def holds_back(self) -> bool:
        """Whether the memory has yet to be written what left at queries that could be taken back."""
        return self.memory is not None and not self.policy.dissolves and self.memory.written < self.length

    def append(self, k: Tensor, v: Tensor) -> None:
        """Take new tokens in. k, v: (rows, kv_heads, n, head_dim)."""
        first = min(max(self.policy.sink - self.length, 0), k.shape[2])
        if first:
            self.sink.append(k[:, :, :first], v[:, :, :first])
        self.recent.append(k[:, :, first:], v[:, :, first:])
        self.length += k.shape[2]

    def evict_blocks(self, drop: bool = True, spare: int = 0) -> None:
        """Let whole blocks leave `recent`.

        Args:
            drop: also forget what no later query sees and what exceeds the limit; without, everything is only packed.
            spare: this many tokens more stay exact.
        """
        if self.memory is not None and not self.policy.dissolves:
            # What left at queries that may still be taken back is written later, so it is still needed.
            spare = max(spare, self.length - self.memory.written)
        if self.policy.recent is not None:
            leave = max(0, self.recent.tokens - self.policy.recent - spare) // BLOCK * BLOCK
            if self.quantized is None:
                if leave and drop:
                    self.recent.pop_front(leave)
                    self.dropped += leave
            elif leave and self._learned(spare):
                self._pack(leave, drop, spare)
        if drop and self.quantized is not None:
            self.quantized.pass_on()
            old = min(self._useless(self.quantized.tokens, spare), self.quantized.tokens)
            if old and self.memory is not None:
                old = self._dissolve(old)
            else:
                self.quantized.drop_front(old)
            self.dropped += old

    def learn(self, queries: Tensor | None, kv_heads: int) -> None:
        """Take in the queries of tokens that come.

        Args:
            queries: (rows, q_heads, n, head_dim); None: whoever attends to them does not tell, so keys are packed as they are.
            kv_heads: number of key heads.
        """
        if self.learning is not None and queries is None:
            self.learning = None
        elif self.learning is not None and queries is not None:
            self.learning.note(queries, kv_heads)

    def _learned(self, spare: int) -> bool:
        """Whether blocks may be packed; fixes what has been learned once none of it will be taken back."""
        if self.learning is None:
            return True
        enough = max(LEARN, self.policy.sink + BLOCK)
        if self.length - spare < enough:
            return False
        assert self.quantized is not None
        # Sinks are not quantised, and are unlike the rest.
        keys = self.recent.keys[:, :, : enough - self.policy.sink]
        self.quantized.stats, self.learning = self.learning.measure(keys, self.policy.partner), None
        return True

    def _pack(self, leave: int, drop: bool, spare: int) -> None:
        assert self.quantized is not None
        held = self.quantized.tokens
        # What would be dropped at once is not packed first, but what goes on to another tier is changed by each.
        whole = len(self.quantized.tiers) > 1 or self.policy.dissolves
        useless = max(0, self._useless(held + leave, spare) - held) if drop and not whole else 0
        # Packed before they leave: what cannot be packed, NaN above all, stays where it is.
        k, v = self.recent.keys[:, :, useless:leave], self.recent.values[:, :, useless:leave]
        if useless:
            self.quantized.drop_front(held)
            self.dropped += held
        self.quantized.append(k, v)
        self.recent.pop_front(leave)
        self.dropped += useless

    def _dissolve(self, old: int) -> int:
        """Give the `old` oldest packed tokens to the Tensor Cache; returns how many have left."""
        assert self.quantized is not None
        assert self.memory is not None
        if self.memory.absorb is None:
            return 0
        place = self.sink.tokens + self.dropped
        self.memory.absorb(*self.quantized.pop_front(old), place)
        return old

    def _useless(self, packed: int, spare: int) -> int:
        """How many of `packed` tokens behind the sinks can go: those past the limit, those outside the window."""
        assert self.quantized is not None
        count = self.quantized.excess(packed - self.quantized.tokens)
        if self.policy.window is not None:
            # The next query, at place `length`, sees places greater than length - window.
            unseen = self.length - spare - self.policy.window + 1 - self.sink.tokens - self.dropped
            count = max(count, max(0, min(unseen, packed)) // BLOCK * BLOCK)
        return count

    def begin_step(
        self,
        k: Tensor,
        v: Tensor,
        packed: bool,
        queries: Runs = NONE,
        positions: Tensor | None = None,
        hold: int = 0,
        asked: Tensor | None = None,
    ) -> StepContext:
        """Begin a call: what its queries read.

        Args:
            k, v: (rows, kv_heads, n, head_dim) of the new tokens.
            packed: pack what leaves `recent` before the queries read it, instead of after.
            queries, hold: see `StepContext`.
            positions: (rows, n) rotary positions of the new tokens, where a memory needs them.
            asked: (rows, q_heads, n, head_dim) queries of the new tokens; None: they are not known.
        """
        first, n = self.length, k.shape[2]
        self.learn(asked, k.shape[1])
        if self.memory is not None:
            self.memory.note(positions)
        if packed or (n <= BLOCK and first):
            self.append(k, v)
            if packed:
                self.evict_blocks(drop=False, spare=hold)
            return StepContext(self, first, n, self.sources(), None, queries, hold)
        # A long call is read where it lies and taken in afterwards, so it is never copied whole.
        sources, window = self.sources(), self.policy.window
        split = min(max(self.policy.sink - first, 0), n) if window is not None else 0
        if split:
            sources.append(KVSource((k[:, :, :split], v[:, :, :split]), first, split))
        if split < n:
            sources.append(KVSource((k[:, :, split:], v[:, :, split:]), first + split, n - split, window))
        return StepContext(self, first, n, sources, (k, v), queries, hold)

    def wait(self) -> StepContext:
        """Begin a call that brings nothing but padding."""
        return StepContext(self, self.length, 0, self.sources(), None)

    def pairs(self, step: StepContext, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the places [begin, end), which are all held exactly: (rows, kv_heads, end - begin, head_dim)."""
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for source in step.sources:
            a, b = max(begin - source.start, 0), min(end - source.start, source.tokens)
            if not isinstance(source.held, Pages) and (a < b or not keys):
                keys.append(source.held[0][:, :, a : max(a, b)])
                values.append(source.held[1][:, :, a : max(a, b)])
        k, v = join(keys, 2), join(values, 2)
        assert k.shape[2] == end - begin
        return k, v

    def end_step(self, step: StepContext) -> None:
        """End a call: take in what has not been yet, pack, drop."""
        if self.memory is not None:
            self.memory.commit()
        if step.pending is not None:
            k, v = step.pending
            size = step.tokens if self.policy.recent is None else PAGE
            for a in range(0, step.tokens, size):
                self.append(k[:, :, a : a + size], v[:, :, a : a + size])
                self.evict_blocks(spare=step.hold)
        else:
            self.evict_blocks(spare=step.hold)
        if self.memory is not None:
            self.memory.keep(self.recent.tokens + (0 if self.quantized is None else self.quantized.tokens))
            self.memory.absorb = None

    def sources(self) -> list[KVSource]:
        """Everything held, in order."""
        sources = []
        # Sinks stay visible outside the window; a layer whose own window hides them has none.
        if self.sink.tokens:
            sources.append(KVSource((self.sink.keys, self.sink.values), 0, self.sink.tokens))
        at, window = self.sink.tokens + self.dropped, self.policy.window
        for view in () if self.quantized is None else self.quantized.views:
            sources.append(KVSource(view, at, view.tokens, window))
            at += view.tokens
        if self.recent.tokens:
            sources.append(KVSource((self.recent.keys, self.recent.values), at, self.recent.tokens, window))
        return sources

    def check_crop(self, n: int) -> None:
        """Refuse to forget the `n` newest tokens where tokens would be needed again that have been dropped.

        Raises:
            ValueError: saying which.
        """
        if self.before and n >= self.length:
            raise ValueError(f"layer {self.layer} has dropped the document before this one; it cannot be cropped so far back")
        if self.memory is not None and not self.policy.dissolves and self.length - n < self.memory.written:
            assert self.policy.window is not None
            if self.memory.written - self.policy.window > self.policy.sink:
                raise ValueError(
                    f"layer {self.layer} has written what left its window of {self.policy.window} tokens into its Tensor "
                    f"Cache, from which nothing can be taken back, so the last {n} tokens cannot be forgotten; call "
                    "cache.activate_past_recording() before the calls that may be cropped"
                )
        if not self.dropped or not n:
            return
        rest, oldest = self.length - n, self.sink.tokens + self.dropped
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
        """Forget the `n` newest tokens; see `check_crop`."""
        rest = self.length - n
        exact = min(n, self.recent.tokens)
        self.recent.pop_back(exact)
        left = n - exact
        if left and self.quantized is not None:
            cut = min(left, self.quantized.tokens)
            block = self.quantized.crop_back(cut)
            if block is not None:
                self.recent.push_front(*block)
            left -= cut
        if left:
            self.sink.pop_back(left)
        if self.memory is not None:
            self.memory.forget(n, rest)
        if self.learning is not None:
            self.learning.cut(rest)
        self.length = rest
        self.slots = self.slots.cut(0, rest)

    def select(self, index: Tensor) -> None:
        """Take rows of the group by their place in it. index: (n,) int64."""
        self.sink.select(index)
        self.recent.select(index)
        if self.quantized is not None:
            self.quantized.select(index)
        if self.memory is not None:
            self.memory.select(index)
        if self.learning is not None:
            self.learning.select(index)

    def taken(self, rows: list[int]) -> SequenceGroup:
        """A group of some of the rows; this one stays as it is."""
        other = copy.copy(self)
        for name in ("sink", "recent", "memory", "learning"):
            setattr(other, name, copy.copy(getattr(self, name)))
        if self.quantized is not None:
            other.quantized = self.quantized.copied()
        other.rows = rows
        other.select(torch.tensor([self.rows.index(row) for row in rows], dtype=torch.long))
        return other

    def buffers(self) -> dict[str, list[Tensor]]:
        """Every tensor that is held, by tier."""
        positions = None if self.memory is None else self.memory.positions
        packed = [[]] if self.quantized is None else self.quantized.buffers()
        if self.quantized is not None and self.learning is not None:
            packed[self.quantized.weighing] += self.learning.buffers()
        return {
            "sink": self.sink.buffers(),
            **{tier_name(number): tensors for number, tensors in enumerate(packed)},
            "recent": [*self.recent.buffers(), *([] if positions is None else [positions])],
            "tc": [] if self.memory is None else self.memory.buffers(),
        }

    def to(self, device: torch.device | str) -> None:
        """Move to another device."""
        self.sink.to(device)
        self.recent.to(device)
        if self.quantized is not None:
            self.quantized.to(device)
        if self.memory is not None:
            self.memory.to(device)
        if self.learning is not None:
            self.learning.to(device)
