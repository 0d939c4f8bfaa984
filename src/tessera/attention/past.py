"""What a Tensor Cache keeps beside a cache of transformers, which has the keys and values of its tokens only."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from tessera.attention.windowed import recalled
from tessera.cache.layer_states import LayerState, state_of, stateful
from tessera.cache.masks import Documents, documents
from tessera.tensor_cache import TensorCacheState
from tessera.tensor_cache.gated_read import MemoryCall, TensorCacheLayer

#: What `LayerStates` calls it.
TENSOR_CACHE = "tensor_cache"
#: When so many of the newest tokens or fewer are taken back, little is written again.
BACK = 64


class Past(LayerState):
    """Documents and rotary positions of the tokens of one layer, and what has been written of them.

    The state is that of the newest document of each row. What has left the window up to the query of slot `written` is in it,
    so a call runs the recurrence over its own tokens only. Keys and values stay with the cache: where the state does not serve,
    as behind a crop that goes back further than `before`, it is made again from them, once.

    Attributes:
        documents: see there.
        slots: number of tokens, padding included.
        positions: (batch, slots) int64; None: nobody needs them.
        state: None: nothing has been written yet.
        written: slots.
        before: an earlier state, and its slots.
    """

    def __init__(self, of: Documents, positions: Tensor | None) -> None:
        self.note(of, positions)
        self.forget()

    def note(self, of: Documents, positions: Tensor | None) -> None:
        """Documents and positions of all tokens up to now."""
        self.documents, self.positions = of, positions
        self.batch, self.slots = of.number.shape

    def forget(self) -> None:
        """What has been written is to be written again."""
        self.owner = ""
        self.state: TensorCacheState | None = None
        self.written = 0
        self.before: tuple[TensorCacheState | None, int] = (None, 0)

    # What is done to its layer

    def select(self, rows: Tensor) -> None:
        """See `LayerState`."""
        at = self.positions
        self.note(self.documents.select(rows), None if at is None else at[rows.to(at.device)])
        self.state = None if self.state is None else self.state.select(rows)
        before, slots = self.before
        self.before = None if before is None else before.select(rows), slots

    def crop(self, seen: int, length: int) -> None:
        """See `LayerState`."""
        if length >= self.slots:
            return
        at = self.positions
        self.note(self.documents.first(length), None if at is None else at[:, :length])
        if length < self.written:
            if length < self.before[1]:
                self.before = None, 0
            self.state, self.written = self.before

    def reset(self) -> None:
        """See `LayerState`."""
        self.crop(self.slots, 0)
        self.forget()

    def to(self, device: torch.device | str) -> None:
        """See `LayerState`."""
        number, place, single = self.documents
        at = self.positions
        self.note(Documents(number.to(device), place.to(device), single), None if at is None else at.to(device))
        self.state = None if self.state is None else self.state.to(device)
        before, slots = self.before
        self.before = None if before is None else before.to(device), slots

    def buffers(self) -> list[Tensor]:
        """See `LayerState`."""
        states = [state for state in (self.state, self.before[0]) if state is not None]
        found = [tensor for state in states for tensor in state.tensors().values()]
        return [*self.documents[:2], *([] if self.positions is None else [self.positions]), *found]

    # Within a call

    def recall(self, memory: TensorCacheLayer, query: Tensor, key: Tensor, value: Tensor, keep: bool) -> Tensor:
        """What the memory adds for the newest tokens, whose documents and positions are known by now.

        Args:
            memory: of the layer.
            query: (batch, heads, n, head_dim).
            key, value: (batch, kv_heads, slots, head_dim).
            keep: whether what is written stays; else it is written for this call alone, and can be differentiated.

        Returns:
            (batch, n, hidden).
        """
        past, of = key.shape[2] - query.shape[2], self.documents
        # Means of chunks depend on where these begin, and a state is of one document.
        keep = keep and not torch.is_grad_enabled() and memory.config.write != "chunk_means"
        if not keep or (not of.single and bool(((of.place == 0) & (of.number > 0))[:, past:].any())):
            self.forget()
            return recalled(memory, query, key, value, of, self.positions)
        memory.memory.check_finite(key[:, :, past:], value[:, :, past:])
        if self.owner != memory.name or self.written > past:
            self.forget()
            self.owner = memory.name
        if self.positions is not None:
            query = memory.unrotated(query, self.positions[:, past:])
        asked = pad(query, (0, 0, past - self.written, 0))
        start, reads = self.written, []
        # In two parts where there is much to be written, so that the newest tokens can be taken back.
        for end in sorted({max(start, key.shape[2] - BACK), key.shape[2]} - {start}):
            self.before = self.state, self.written
            reads.append(self._write(memory, asked[:, :, self.written - start : end - start], key, value, end))
        return memory.project(torch.cat(reads, 2)[:, :, past - start :], query)

    def _write(self, memory: TensorCacheLayer, query: Tensor, key: Tensor, value: Tensor, end: int) -> Tensor:
        """Write what leaves the window at the slots from `written` to `end`, and read at each.

        query: (batch, heads, end - written, head_dim); returns as much.
        """
        at, live = self._leaving(memory.config.window, memory.config.sink, end)
        k, v = (x.gather(2, at[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])) for x in (key, value))
        if self.positions is not None:
            k = memory.unrotated(k, self.positions.gather(1, at))
        state = memory.memory.initial_state(k.shape[0], k[:, :, :0]) if self.state is None else self.state.to(k.device)
        read, self.state = memory.memory.advance(query, k, v, live, state)
        self.written = end
        return read

    def _leaving(self, window: int, sink: int, end: int) -> tuple[Tensor, Tensor]:
        """Which slot leaves the window at each slot from `written` to `end`, and whether there is one to be written."""
        number, place, single = self.documents
        new = slice(self.written, end)
        live = place[:, new] - window >= sink
        if single:
            slot = torch.arange(self.written, end, device=number.device).expand(self.batch, -1)
            return (slot - window).clamp(min=0), live
        real = number >= 0
        # The slots of real tokens, in order, in front.
        order = (~real).to(torch.int8).argsort(dim=1, stable=True)
        count = real.cumsum(1)[:, new] - 1
        live &= real[:, new] & (number[:, new] == number.amax(1, keepdim=True))
        return order.gather(1, (count - window).clamp(min=0)), live


def tokens_so_far(call: MemoryCall, query: Tensor, slots: int, mask: Tensor | None) -> Past:
    """Documents and positions of all slots of a call, noted on the layer of its cache for the next one.

    Args:
        call: whose cache is transformers' own, or None.
        query: (batch, heads, tokens, head_dim).
        slots: tokens in the cache, the call's own included.
        mask: of the call.

    Raises:
        ValueError: if the cache holds tokens that went through attention without the memory.
    """
    batch, n = query.shape[0], query.shape[2]
    past, layer = slots - n, None if call.cache is None else call.cache.layers[call.layer]
    known = None if layer is None else state_of(layer, TENSOR_CACHE)
    if not isinstance(known, Past) or past == 0:
        known = None
    if past and (known is None or known.slots < past or known.batch != batch):
        raise ValueError(
            f"this cache holds {past} tokens of {batch} rows, of which the Tensor Cache has seen "
            f"{0 if known is None else known.slots}: it was filled without the memory. Begin with a new cache"
        )
    if known is not None:
        known.to(query.device)
        known.crop(known.slots, past)  # what lies behind has been cut off by hand
    of = documents(mask, query, slots, None if known is None else known.documents)
    positions = call.positions_of(query)
    if positions is not None:
        # A copy in any case: what the caller gave is written anew for its next call, as likely as not.
        positions = positions.expand(batch, -1)
        old = positions[:, :0] if known is None else known.positions
        assert old is not None
        positions = torch.cat((old, positions), dim=1)
    if known is None:
        known = Past(of, positions)
        if layer is not None:
            stateful(layer).put(TENSOR_CACHE, known)
    known.note(of, positions)
    return known


def recall(call: MemoryCall, past: Past, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What a Tensor Cache adds for the tokens of a call; see `Past.recall`, and `tokens_so_far` for `past`."""
    added = past.recall(call.memory, query, key, value, keep=call.cache is not None)
    if call.cache is not None:
        stateful(call.cache.layers[call.layer]).used()
    return added
