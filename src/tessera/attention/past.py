"""The state of a Tensor Cache beside a cache of transformers, which holds only keys and values."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from tessera.attention.documents import Documents, MaskReading, SlidingWindow
from tessera.attention.read_masks import note_mask, read_documents
from tessera.attention.windowed import recalled
from tessera.cache_layers.layer_states import LayerState, state_of, stateful
from tessera.devices import upload
from tessera.finite import FiniteCheck
from tessera.tensor_cache import TensorCacheState
from tessera.tensor_cache.gated_read import MemoryCall, TensorCacheLayer

#: Its kind in `LayerStates`.
TENSOR_CACHE = "tensor_cache"
#: A crop by at most this many newest tokens needs few writes again.
BACK = 64


class Past(LayerState):
    """Documents and rotary positions of the tokens of one layer, and the memory's state.

    The state is that of the newest document of each row. It contains what left the window up to the query of slot `written`, so
    a call runs the recurrence over its own tokens only. Keys and values are in the cache: where the state cannot be used, as
    after a crop further back than `before`, it is computed again from them, once.

    Attributes:
        documents: see `Documents`.
        slots: number of tokens, padding included.
        positions: (batch, slots) int64; None: not needed.
        state: None: nothing has been written yet.
        written: slots.
        before: an earlier state, and its number of slots.
        finite: findings in the memories of a cache, kept by the first layer with a memory.
    """

    def __init__(self, of: Documents, positions: Tensor | None) -> None:
        self.finite = FiniteCheck()
        self.note(of, positions)
        self.forget()

    def note(self, of: Documents, positions: Tensor | None) -> None:
        """Store documents and positions of all tokens so far."""
        self.documents, self.positions = of, positions
        self.batch, self.slots = of.batch, of.slots

    def forget(self) -> None:
        """Drop the state, so that it is computed again."""
        self.owner = ""
        self.state: TensorCacheState | None = None
        self.written = 0
        self.before: tuple[TensorCacheState | None, int] = (None, 0)

    # Changes of its layer

    def select(self, rows: Tensor) -> None:
        """See `LayerState`."""
        at = self.positions
        self.note(self.documents.select(rows), None if at is None else at[upload(rows, at.device)])
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
        self.finite.reset()

    def to(self, device: torch.device | str) -> None:
        """See `LayerState`."""
        self.positions = None if self.positions is None else self.positions.to(device)
        self.state = None if self.state is None else self.state.to(device)
        before, slots = self.before
        self.before = None if before is None else before.to(device), slots

    def buffers(self) -> list[Tensor]:
        """See `LayerState`."""
        states = [state for state in (self.state, self.before[0]) if state is not None]
        found = [tensor for state in states for tensor in state.tensors().values()]
        return [*self.documents.buffers(), *([] if self.positions is None else [self.positions]), *found]

    # Within a call

    def recall(
        self, memory: TensorCacheLayer, query: Tensor, key: Tensor, value: Tensor, keep: bool, finite: FiniteCheck | None
    ) -> Tensor:
        """Compute the memory's contribution for the newest tokens, whose documents and positions have been noted.

        Args:
            memory: the layer's memory.
            query: (batch, heads, n, head_dim).
            key, value: (batch, kv_heads, slots, head_dim).
            keep: whether the new state is kept; if False it is computed for this call alone, and is differentiable.
            finite: see `recalled`.

        Returns:
            (batch, n, hidden).
        """
        past, of = key.shape[2] - query.shape[2], self.documents
        # Means of chunks depend on where chunks begin, and a state belongs to one document.
        keep = keep and not torch.is_grad_enabled() and memory.config.write != "chunk_means"
        if not keep or of.begin_after(past):
            self.forget()
            return recalled(memory, query, key, value, of, self.positions, finite)
        memory.memory.check_finite(key[:, :, past:], value[:, :, past:], finite)
        if self.owner != memory.name or self.written > past:
            self.forget()
            self.owner = memory.name
        if self.positions is not None:
            query = memory.unrotated(query, self.positions[:, past:])
        asked = pad(query, (0, 0, past - self.written, 0))
        start, reads = self.written, []
        # Many writes are made in two parts, so that the newest tokens can be cropped.
        for end in sorted({max(start, key.shape[2] - BACK), key.shape[2]} - {start}):
            self.before = self.state, self.written
            reads.append(self._write(memory, asked[:, :, self.written - start : end - start], key, value, end))
        return memory.project(torch.cat(reads, 2)[:, :, past - start :], query)

    def _write(self, memory: TensorCacheLayer, query: Tensor, key: Tensor, value: Tensor, end: int) -> Tensor:
        """Write what leaves the window at the slots from `written` to `end`, and read at each of them.

        query, and the result: (batch, heads, end - written, head_dim).
        """
        at, live = self._leaving(memory.config.window, memory.config.sink, end, key.device)
        k, v = (x.gather(2, at[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])) for x in (key, value))
        if self.positions is not None:
            k = memory.unrotated(k, self.positions.gather(1, at))
        state = memory.memory.initial_state(k.shape[0], k[:, :, :0]) if self.state is None else self.state.to(k.device)
        read, self.state = memory.memory.advance(query, k, v, live, state)
        self.written = end
        return read

    def _leaving(self, window: int, sink: int, end: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Find the slot that leaves the window at each slot from `written` to `end`, and whether it is to be written."""
        of = self.documents
        if of.single:
            leaving = torch.arange(self.written, end, device=device).expand(self.batch, -1) - window
            return leaving.clamp(min=0), leaving >= sink
        new, real = slice(self.written, end), of.number >= 0
        count = of.count[:, new] - 1
        live = (of.place[:, new] - window >= sink) & real[:, new] & (of.number[:, new] == of.number.max(1, keepdims=True))
        at = np.take_along_axis(of.order, (count - window).clip(min=0), 1)
        return upload(torch.as_tensor(at), device), upload(torch.as_tensor(live), device)


def tokens_so_far(
    call: MemoryCall, query: Tensor, slots: int, mask: Tensor | None, limits: SlidingWindow
) -> tuple[Past, MaskReading]:
    """Find documents and positions of all slots of a call, and store them on the cache's layer for the next call.

    Args:
        call: whose cache is transformers' own, or None.
        query: (batch, heads, tokens, head_dim).
        slots: tokens in the cache, the call's own included.
        mask: attention mask of the call.
        limits: the memory's.

    Raises:
        ValueError: if the cache holds tokens that the memory has not seen, or a mask that it cannot follow; and for what an
            earlier call found, see `FiniteCheck.read`.
    """
    batch, n = query.shape[0], query.shape[2]
    past, layer = slots - n, None if call.cache is None else call.cache.layers[call.layer]
    if past:
        note_mask(mask)  # the state may have to read first how its rows were reordered
    known = None if layer is None else state_of(layer, TENSOR_CACHE)
    if not isinstance(known, Past) or past == 0:
        known = None
    check = _check_of(call) if past else None
    if check is not None and check.broken:
        check.read()  # first, because what was refused is in the cache nevertheless
    if past and (known is None or known.slots < past or known.batch != batch):
        raise ValueError(
            f"this cache holds {past} tokens of {batch} rows, of which the Tensor Cache has seen "
            f"{0 if known is None else known.slots}: it was filled without the memory. Begin with a new cache"
        )
    if known is not None:
        known.to(query.device)
        known.crop(known.slots, past)  # the newest tokens were cut off without `crop`
    finite = None if known is None or check is not known.finite else check
    before = None if known is None else known.documents
    said = read_documents(mask, query, slots, limits, before, True, finite)
    of = said.of
    positions = call.positions_of(query)
    if positions is not None:
        # A copy in any case: the caller is likely to overwrite its tensor for its next call.
        positions = positions.expand(batch, -1)
        old = positions[:, :0] if known is None else known.positions
        assert old is not None
        positions = torch.cat((old, positions), dim=1)
    if known is None:
        known = Past(of, positions)
        if layer is not None:
            stateful(layer).put(TENSOR_CACHE, known)
    known.note(of, positions)
    return known, said


def _check_of(call: MemoryCall) -> FiniteCheck | None:
    """Return the check for finite numbers that the layers of a cache share, that of its first layer with a memory."""
    layers = () if call.cache is None else call.cache.layers
    states = (state_of(layer, TENSOR_CACHE) for layer in layers)
    return next((state.finite for state in states if isinstance(state, Past)), None)


def recall(call: MemoryCall, past: Past, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute a Tensor Cache's contribution for a call's tokens; see `Past.recall`, and `tokens_so_far` for `past`."""
    added = past.recall(call.memory, query, key, value, call.cache is not None, _check_of(call))
    if call.cache is not None:
        stateful(call.cache.layers[call.layer]).used()
    return added
