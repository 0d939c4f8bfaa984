"""One layer of the cache, and the steps of a call through it.

`update` only stages keys and values: where padding ends is known from the mask, which transformers passes to the attention
function, so tokens are stored there. A call has three steps, of which this file has two and the attention function runs in
between:

    update        the model gives keys and values; they are staged, and `DeferredKV`s go to the attention function
    begin_step    that has the mask: staged tokens are sorted into groups, and each group says what its queries read
    end_step      the queries have read: tokens are taken in, quantised, passed on and dropped

`tessera.attention.over_tiers` begins and ends the step of a call; `take_token` does both at once for one token in every row
where nothing else can happen. Where nobody does, because the attention is another (`_materialise`) or never asked
(`flush_staged`), the layer does both itself.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from tessera.cache_layers.deferred import ATTENTION, DeferredKV
from tessera.cache_layers.dense import assemble
from tessera.cache_layers.group import RECORDED, SequenceGroup, StepContext
from tessera.cache_layers.grouping import Share, shares
from tessera.cache_layers.layer_states import LayerStates
from tessera.cache_layers.masks import GroupMask, MaskMemo
from tessera.cache_layers.new_tokens import NewTokens, Rule, read_mask, shown
from tessera.tiers.chain import tier_name
from tessera.tiers.policy import RetentionPolicy

#: Where a model keeps what `tessera.attach` did to it.
ATTACHED = "_tessera_attachment"


class CacheContext:
    """The state that the layers of a cache share: the model's config, and a memo of its masks.

    Args:
        config: the very config object that the model's attention modules read.
        quantize_before_attend: whether queries of a call read the tokens that it quantises in their quantised form, see
            `Cache`.
        bounded: the spec drops tokens.
        last: index of the last layer.
        sinks_known: whether the check for missing sinks is done: the spec has some, compresses nothing, or was checked.
    """

    def __init__(self, config: Any, quantize_before_attend: bool, bounded: bool, last: int, sinks_known: bool = True) -> None:
        self.config = config
        self.quantize_before_attend = quantize_before_attend
        self.bounded = bounded
        self.last = last
        self.sinks_known = sinks_known
        self.masks = MaskMemo()
        self.warned = False
        self.read = False
        self.unread: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # The memo identifies masks by object identity, which holds in this process only.
        return {name: value for name, value in self.__dict__.items() if name not in ("masks", "unread")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.masks, self.unread = MaskMemo(), None

    def __deepcopy__(self, memo: object) -> CacheContext:
        # A copied cache serves the same model, whose attention may be switched later.
        return self

    @property
    def reads_sources(self) -> bool:
        """Whether the model's attention is ours and understands deferred keys and values."""
        return getattr(self.config, "_attn_implementation", None) == ATTENTION

    def warn(self) -> None:
        """Warn once that attention needs dense keys and values, so memory is saved between calls only."""
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"the model's attention is {getattr(self.config, '_attn_implementation', None)!r}, not {ATTENTION!r}: the "
                "cache is decoded into dense keys and values for every call, one layer at a time. It stays small between the "
                "calls, but the calls are slower and need more memory; tessera.enable(model) avoids this.",
                stacklevel=6,
            )

    def warn_read(self) -> None:
        """Warn once what it costs to read the cache as plain tensors."""
        if not self.read:
            self.read = True
            warnings.warn(
                "the keys and values of a tessera.Cache are decoded anew, whole, every time that they are read as tensors; "
                "what is written into them changes nothing in the cache",
                stacklevel=4,
            )


class TesseraLayer(CacheLayerMixin):
    """The tiers of one attention layer.

    Args:
        index: index of the layer in its model.
        policy: what to keep.
        shape: (kv_heads, head_dim).
        sliding: window of the layer's own attention in tokens, or None.
        context: shared with the other layers.
    """

    is_compileable = False

    def __init__(
        self, index: int, policy: RetentionPolicy, shape: tuple[int, int], sliding: int | None, context: CacheContext
    ) -> None:
        # Not super().__init__(), which would set `keys` and `values`.
        self.index = index
        self.policy = policy
        self.shape = shape
        self.sliding = sliding
        self.context = context
        self.is_sliding = sliding is not None
        self.is_croppable = policy.recent is None
        self.record_past = False
        self.memory_states = LayerStates()  # states of memories beside the tiers, which track padding themselves
        #: A caller that cropped after one call is expected to crop after the next: "next" until that call, "now" until its
        #: crop.
        self._hold: Literal["", "next", "now"] = ""
        self.dtype: torch.dtype | None = None  # of keys, the widest so far
        self.value_dtype: torch.dtype | None = None
        self.device: torch.device | None = None
        self.held_on: torch.device | None = None  # elsewhere than `device` while offloaded
        self._empty()

    def _empty(self) -> None:
        self.seen = 0
        self.batch = 0
        self.groups: list[SequenceGroup] = []
        self.waiting: list[int] = []  # rows that have seen nothing but padding
        self._staged: tuple[Tensor, Tensor] | None = None
        self.is_initialized = False

    # What the model calls

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learn batch size, dtypes and device."""
        self.dtype, self.value_dtype = key_states.dtype, value_states.dtype
        self.device = self.held_on = key_states.device
        self.batch = key_states.shape[0]
        self.waiting = list(range(self.batch))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Stage new tokens. key_states, value_states: (batch, kv_heads, tokens, head_dim).

        Returns:
            keys and values as Tessera's attention function understands them; decoded if the model uses another.

        Raises:
            ValueError: if they do not fit the model that the cache was made for, or its batch, and on a CPU for keys or values
                that are not finite where a memory will absorb them; elsewhere see `FiniteCheck`.
            RuntimeError: in gradient mode.
        """
        self.flush_staged()
        self._check(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._hold = "now" if self._hold == "next" else ""
        self._follow(key_states, value_states)
        self._staged = key_states.detach(), value_states.detach()
        self.seen += key_states.shape[2]
        if self.context.reads_sources:
            return DeferredKV(self, "key"), DeferredKV(self, "value")
        return self._materialise()

    def _follow(self, k: Tensor, v: Tensor) -> None:
        """Move to the device of the newest keys, and widen the dtypes to theirs where those are wider."""
        assert self.dtype is not None
        assert self.value_dtype is not None
        self.dtype, self.value_dtype = torch.promote_types(self.dtype, k.dtype), torch.promote_types(self.value_dtype, v.dtype)
        if self.held_on != k.device:
            self.to(k.device)
            self.device = k.device

    @property
    def _dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Return the dtypes of keys and of values, which must have been given before."""
        assert self.dtype is not None
        assert self.value_dtype is not None
        return self.dtype, self.value_dtype

    def _check(self, k: Tensor, v: Tensor) -> None:
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise RuntimeError(
                "tessera.Cache keeps no gradients, so a loss computed through it would be wrong; wrap the call in "
                "torch.no_grad() or torch.inference_mode(), or train without a cache"
            )
        if k.shape != v.shape or (k.shape[1], k.shape[3]) != self.shape:
            expected = f"(batch, {self.shape[0]}, tokens, {self.shape[1]})"
            raise ValueError(
                f"layer {self.index} was given keys {tuple(k.shape)} and values {tuple(v.shape)}, but this cache was made for "
                f"a model with {expected}; make a cache for each model, and of a tensor-parallel one from the model itself, "
                "not from its config"
            )
        if self.policy.tensor_cache:
            self.policy.finite.look(k, v)
        if self.is_initialized and k.shape[0] != self.batch:
            raise ValueError(
                f"the cache holds {self.batch} rows and was given {k.shape[0]}; use cache.batch_repeat_interleave or "
                "cache.batch_select_indices to change the batch, or cache.reset() to begin anew"
            )

    def get_seq_length(self) -> int:
        """Slots seen, padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the mask of the next call, and the slot of the first."""
        offset = 0 if self.sliding is None else max(self.seen - self.sliding + 1, 0)
        return self.seen + query_length - offset, offset

    def get_max_length(self) -> int:
        """Most slots that matter to a query; -1 if all do."""
        return -1 if self.sliding is None else self.sliding

    def get_max_cache_shape(self) -> int:
        """Return `get_max_length`, under the older name of the method."""
        return self.get_max_length()

    # For libraries that read caches

    @property
    def keys(self) -> Tensor | None:
        """The keys that are held, decoded: see `dense`. None before the first tokens."""
        held = self.dense()
        return None if held is None else held[0]

    @property
    def values(self) -> Tensor | None:
        """The values that are held, decoded: see `dense`. None before the first tokens."""
        held = self.dense()
        return None if held is None else held[1]

    def dense(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values of all slots, or of those inside the window of a sliding layer, decoded and zero at padding.

        They are copies, made anew by every call, each (batch, kv_heads, slots, head_dim).

        Returns:
            keys and values; None before the first tokens.

        Raises:
            RuntimeError: for a spec that drops tokens, of whose slots not all have a key.
        """
        if not self.is_initialized:
            return None
        if self.context.bounded:
            raise RuntimeError(
                "a cache whose spec drops tokens ('window', '@limit') has no keys and values of all its slots to be read as "
                "tensors; use a spec that keeps all, such as 'sink:4 + hqmq:4 + recent:128'"
            )
        self.context.warn_read()
        first = 0 if self.sliding is None else max(self.seen - self.sliding + 1, 0)
        size = (self.batch, self.shape[0], self.seen - first, self.shape[1])
        groups = [(group.rows, group.slots, group.chain.sources()) for group in self.groups]
        keys, values = assemble(groups, size, first, self._dtypes, self.device)
        if self._staged is not None:
            # Within a call its tokens have not been sorted yet, because its padding is not known.
            n = min(self._staged[0].shape[2], size[2])
            keys[:, :, size[2] - n :], values[:, :, size[2] - n :] = (x[:, :, x.shape[2] - n :] for x in self._staged)
        return keys, values

    # What the attention function calls

    def begin_step(
        self, mask: Tensor | None, positions: Tensor | None = None, queries: Tensor | None = None
    ) -> list[tuple[StepContext, GroupMask | None]]:
        """Sort the staged tokens into groups.

        Args:
            mask: (batch or 1, heads or 1, queries, slots) as the model made it; None: causal, no padding.
            positions: (batch or 1, queries) rotary positions of the new tokens, where a memory needs them.
            queries: (batch, q_heads, queries, head_dim) of the new tokens; None: they are not known.

        Returns:
            for each group what the queries of its rows read, and the mask for these rows where one is needed. Groups without
            new tokens are left out, except those with writes to their memory held back, which are made now in a step without
            tokens.

        Raises:
            ValueError: for a mask that shows tokens that are no longer held, or hides tokens that a memory has absorbed;
                nothing is changed.
        """
        if self._staged is None:
            raise RuntimeError(f"layer {self.index}: attention was called twice for one update of the cache")
        k, v = self._staged
        self._staged = None
        n = k.shape[2]
        before = self.seen - n
        try:
            said = self._read_mask(mask, n)
            found = shares(self.policy, self.index, self.groups, self.waiting, said, n, before)
            views = [self._view(mask, share, said) for share in found.shares]
        except Exception:  # also a warning that is an error
            self.seen = before
            raise
        self.groups, self.waiting = found.groups, found.waiting
        hold = RECORDED if self.record_past or self._hold == "now" else 0
        steps = []
        for share, view in zip(found.shares, views, strict=True):
            group, tokens = share.group, share.tokens
            keys, values = (tokens.of(self._rows(x, group.rows), 0, 2) for x in (k, v))
            own = None if positions is None else tokens.of(self._rows(positions.expand(self.batch, -1), group.rows), 0, 1)
            group.slots = share.slots
            asked = None
            if group.chain.learning is not None and queries is not None:
                asked = tokens.of(self._rows(queries, group.rows), 0, 2)
            step = group.begin_step(keys, values, self.context.quantize_before_attend, tokens, own, hold, asked)
            index = self._index(group.rows, k.device)
            steps.append((step if index is None else replace(step, index=index), view))
        if not hold:
            given = {id(share.group) for share in found.shares}
            idle = [group for group in self.groups if id(group) not in given and group.holds_back]
            steps += [(replace(group.idle_step(), index=self._index(group.rows, k.device)), None) for group in idle]
        return steps

    def take_token(self, queries: Tensor) -> SequenceGroup | None:
        """Begin and end a step of one token in every row without padding, where nothing is to be quantised or dropped.

        Nearly every step of decoding is one, so this way is the shortest. The caller has no mask, no call of a memory, and no
        check for missing sinks to make.

        Args:
            queries: (batch, q_heads, 1, head_dim) of the token.

        Returns:
            the group, whose tokens the queries read, all of them; None: nothing was done, and `begin_step` and `end_step` do
            it.
        """
        if self._staged is None or len(self.groups) != 1 or self.waiting or self._hold or self.record_past:
            return None
        k, v = self._staged
        group, finite = self.groups[0], self.policy.finite
        if k.shape[2] != 1 or self.context.quantize_before_attend or finite.broken or finite.pending() is not None:
            return None
        if not group.chain.add_token(k, v):
            return None
        if group.chain.learning is not None:
            group.chain.learn(queries, k.shape[1])
        self._staged = None
        group.length += 1
        group.slots = group.slots.with_next(self.seen - 1)
        if self.index == self.context.last:
            self.context.masks.forget()
        return group

    def _check_mask(self, mask: Tensor, n: int) -> None:
        queries, slots = mask.shape[-2:]
        fits = slots == self.seen if self.sliding is None else slots <= self.seen
        if mask.ndim != 4 or queries != n or not fits or mask.shape[0] not in (1, self.batch):
            raise ValueError(
                f"layer {self.index}: an attention mask of shape {tuple(mask.shape)} does not fit {self.batch} rows, {n} "
                f"queries and {self.seen} slots"
            )

    def _read_mask(self, mask: Tensor | None, n: int) -> NewTokens | None:
        """Read which of the call's tokens are padding; None: all are real and see all before them.

        In the first layer of a call the findings of the finite checks since the last call are read with it.
        """
        finite = self.policy.finite if self.index == 0 else None
        if mask is None:
            if finite is not None:
                finite.read()
            return None
        self._check_mask(mask, n)
        policy = self.policy
        memory = (policy.window or 0, policy.sink) if policy.tensor_cache and not policy.dissolves else None
        rule = Rule(self.sliding, policy.by_document, memory)
        question = rule, tuple((tuple(group.rows), group.slots) for group in self.groups)

        def look() -> NewTokens | None:
            known = np.zeros((self.batch, mask.shape[-1] - n), dtype=np.bool_)
            first = self.seen - mask.shape[-1]
            for group in self.groups:
                for slot, size in group.slots.runs:
                    begin = max(0, slot - first)
                    if begin < slot + size - first:
                        known[group.rows, begin : slot + size - first] = True
            return read_mask(mask, known, rule, finite)

        said: NewTokens | None = self.context.masks.ask(mask, question, look)
        return said

    def _index(self, rows: list[int], device: torch.device) -> Tensor | None:
        """Return row numbers as a tensor, or None for the whole batch."""
        return None if len(rows) == self.batch else self.context.masks.index(rows, device)

    def _rows(self, x: Tensor, rows: list[int]) -> Tensor:
        index = self._index(rows, x.device)
        return x if index is None else x.index_select(0, index)

    def _view(self, mask: Tensor | None, share: Share, said: NewTokens | None) -> GroupMask | None:
        """Return the mask for the rows of a share; None where positions alone imply it."""
        if mask is None or said is None:
            return None
        group, low = share.group, share.slots.before(self.seen - mask.shape[-1])
        # Padding within a window, which is of slots, hides more than one of places would.
        if all(said.plain[row] for row in group.rows) and low <= max(0, group.length - (self.sliding or 0) + 1):
            return None
        if any(said.strange[row] for row in group.rows):
            raise ValueError(
                f"layer {self.index}: the attention mask shows tokens that this cache no longer has: padding when they came"
                + (", or of a document before this one" if self.policy.by_document else "")
            )
        if any(said.absorbed[row] for row in group.rows):
            raise ValueError(
                f"layer {self.index}: the attention mask hides tokens that have left the window of {self.policy.window}, which "
                "the Tensor Cache has absorbed; it can hide padding and whole documents only. Use a cache without 'tc'"
            )
        if group.irrevocable:
            raise ValueError(
                f"layer {self.index}: the attention mask hides tokens, of which the Tensor Cache may have absorbed some; "
                "behind a codec it can hide padding only. Use a cache without 'tc'"
            )

        def make() -> GroupMask:
            index = self._index(group.rows, mask.device)
            return GroupMask(shown(mask), index, share.tokens, share.slots, self.seen)

        view: GroupMask = self.context.masks.ask(mask, (tuple(group.rows), share.tokens, share.slots), make)
        return view

    def end_step(self, steps: list[tuple[StepContext, GroupMask | None]]) -> None:
        """End the call: store its tokens, quantise, and drop."""
        for step, _ in steps:
            step.group.end_step(step)
        if not self.record_past and not self._hold:
            # Rows that had only padding in this call may still have held-back tokens, which can no longer be cropped.
            for group in self.groups:
                group.evict_blocks()
        if self.index == self.context.last:
            self.context.masks.forget()

    # For attention functions that are not ours

    def flush_staged(self) -> None:
        """Store staged tokens that no attention function asked for."""
        if self._staged is not None:
            self.end_step(self.begin_step(None))

    def _materialise(self) -> tuple[Tensor, Tensor]:
        """Decode keys and values of all slots that the mask has columns for: (batch, kv_heads, slots, head_dim)."""
        if self.context.bounded:
            raise RuntimeError(
                "a spec that drops tokens ('window', '@limit') works with Tessera's attention only, because other attention "
                "functions cannot skip the gap; call tessera.enable(model)"
            )
        self.context.warn()
        steps = self.begin_step(None)
        first = steps[0][0]
        offset = 0 if self.sliding is None else max(self.seen - first.tokens - self.sliding + 1, 0)
        size = (self.batch, self.shape[0], self.seen - offset, self.shape[1])
        groups = [(step.group.rows, step.group.slots, step.sources) for step, _ in steps]
        keys, values = assemble(groups, size, offset, self._dtypes, self.device)
        self.end_step(steps)
        return keys, values

    # Changes of the batch and of the length

    def select(self, rows: Tensor | Sequence[int]) -> None:
        """Row i of the new batch is row rows[i] of the old one. rows: (n,) int64."""
        self.flush_staged()
        if not self.is_initialized:
            return
        order: list[int] = rows.tolist() if isinstance(rows, Tensor) else list(rows)
        if order == list(range(self.batch)):
            return
        self.memory_states.reorder(torch.tensor(order, dtype=torch.long))
        groups = []
        for group in self.groups:
            place = {row: i for i, row in enumerate(group.rows)}
            new = [i for i, row in enumerate(order) if row in place]
            if not new:
                continue
            index = [place[order[i]] for i in new]
            if index != list(range(len(group.rows))):
                group.select(torch.tensor(index, dtype=torch.long))
            group.rows = new
            groups.append(group)
        self.groups = groups
        waiting = set(self.waiting)
        self.waiting = [i for i, row in enumerate(order) if row in waiting]
        self.batch = len(order)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow a beam search. beam_idx: (batch,) int64."""
        self.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self.select(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows that `indices` names or, if it is boolean, marks."""
        self.select(torch.arange(self.batch)[torch.as_tensor(indices).cpu()])

    def activate_past_recording(self) -> None:
        """Keep up to `RECORDED` newest tokens exact and croppable: packing, dropping and writing wait until the next `crop`.

        Behind a crop the next call is recorded likewise, so that one activation serves for call, crop, call, crop, as in
        assisted generation. A call that is not cropped before the next one ends that.
        """
        self.record_past = True
        self.memory_states.record_past()

    def check_crop(self, tokens_to_remove: int) -> int:
        """Return the number of slots that `crop` would remove; refuses as `crop` does.

        Raises:
            TypeError: if it is no whole number.
            ValueError: if tokens would be needed again that have been dropped.
        """
        tokens_to_remove = _whole(tokens_to_remove)
        self.flush_staged()
        n = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.seen - tokens_to_remove)
        n = min(n, self.seen)
        for group in self.groups:
            group.check_crop(group.length - group.slots.before(self.seen - n))
        self.memory_states.check_crop(self.seen, self.seen - n)
        return n

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest -`tokens_to_remove` slots; a positive number is the length to keep.

        Raises:
            TypeError: if it is no whole number.
            ValueError: if tokens would be needed again that have been dropped; then nothing is removed.
        """
        n = self.check_crop(tokens_to_remove)
        self.memory_states.crop(self.seen, self.seen - n)
        if n:
            for group in self.groups:
                group.crop(group.length - group.slots.before(self.seen - n))
            self.seen -= n
            gone = [group for group in self.groups if not group.length]
            self.groups = [group for group in self.groups if group.length]
            self.waiting = sorted([*self.waiting, *(row for group in gone for row in group.rows)])
        self._hold = "next" if self.record_past or self._hold else ""
        self.record_past = False
        for group in self.groups:
            group.evict_blocks()

    def reset(self) -> None:
        """Forget everything."""
        self._empty()
        self.policy.finite.reset()
        self.memory_states.reset()
        self._hold = ""

    def offload(self) -> None:
        """Move to the CPU."""
        self.to("cpu")

    def prefetch(self) -> None:
        """Move back to where the model needs it."""
        if self.device is not None:
            self.to(self.device)

    def to(self, device: torch.device | str | int) -> None:
        """Move to another device."""
        self.flush_staged()
        device = torch.device(device)
        self.held_on = device
        for group in self.groups:
            group.chain.to(device)
        self.memory_states.to(device)

    # Inspection

    def buffers(self) -> dict[str, list[Tensor]]:
        """Every tensor that is held, by tier."""
        found: dict[str, list[Tensor]] = {name: [] for name in self._tier_names("tc", "tm")}
        for group in self.groups:
            for tier, tensors in group.chain.buffers().items():
                found[tier] += tensors
        if self.policy.stats is not None:
            found[tier_name(0)].append(self.policy.stats.sizes)
        found["tm"] += self.memory_states.buffers()
        if self._staged is not None:
            found["staged"] += self._staged
        return found

    def _tier_names(self, *last: str) -> list[str]:
        aged = [tier_name(number) for number in range(len(self.policy.codecs))]
        return ["sink", *aged, *self.policy.others, "recent", *last, "staged"]

    def held(self) -> dict[str, int]:
        """Tokens of all rows by tier."""
        found = dict.fromkeys(self._tier_names(), 0)
        for group in self.groups:
            for tier, tokens in group.chain.held.items():
                found[tier] += tokens * len(group.rows)
        if self._staged is not None:
            found["staged"] = self._staged[0].shape[0] * self._staged[0].shape[2]
        return found


def _whole(number: Any) -> int:
    """Convert a number of tokens to int, from an int or, for example, a tensor of one element."""
    truth = isinstance(number, bool) or getattr(number, "dtype", None) == torch.bool
    try:
        if truth:
            raise TypeError
        return operator.index(number)
    except TypeError:
        raise TypeError(f"crop takes a whole number of tokens, such as -3, got {number!r}") from None
