"""States that memories keep on a layer of a cache, ours or transformers', beside its keys and values.

It is on the layer, as the state of transformers' own recurrent layers is, because every method of a cache is that of its
layers, one after the other. So reordering, cropping, resetting, offloading, copying, pickling and deleting a cache do the same
to the states. Our own layers call `LayerStates` themselves; a layer of transformers gets a new class, derived from its own and
`_Stateful`, which calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from tessera.readback import HostCopy

#: Attribute of a layer that holds its states.
STATES = "memory_states"


class LayerState:
    """The state of one memory on one layer; this base class keeps nothing.

    Attributes:
        batch: number of rows.
    """

    batch = 0

    def select(self, rows: Tensor) -> None:
        """Row i of the new batch is row rows[i] of this one. rows: (n,) int64 on the CPU."""

    def check_crop(self, seen: int, length: int) -> None:
        """Refuse to crop from `seen` tokens to `length`, padding included, where that is impossible.

        Raises:
            ValueError: saying why, and what to do.
        """

    def crop(self, seen: int, length: int) -> None:
        """Crop from `seen` tokens to `length`; see `check_crop`."""

    def reset(self) -> None:
        """Forget everything."""

    def to(self, device: torch.device | str) -> None:
        """Move to another device."""

    def buffers(self) -> list[Tensor]:
        """Every tensor that is held."""
        return []

    def record_past(self) -> None:
        """Prepare for crops of the tokens of later calls."""

    def detach(self) -> None:
        """Cut the graph."""


class LayerStates:
    """The states of one layer, by kind of memory.

    Attributes:
        away: the layer is offloaded, so that states are moved back to the CPU after use.
    """

    def __init__(self) -> None:
        self._known: dict[str, LayerState] = {}
        self._orders: list[HostCopy] = []  # of rows, which the host does not know yet
        self.away = False

    @property
    def _states(self) -> dict[str, LayerState]:
        """The states, with their rows in the order of the cache's."""
        orders, self._orders = self._orders, []
        for order in orders:
            rows = torch.as_tensor(order.get())
            for state in self._known.values():
                state.select(torch.arange(state.batch)[rows])
        return self._known

    def get(self, kind: str) -> LayerState | None:
        """The state of the memory of this kind."""
        return self._states.get(kind)

    def put(self, kind: str, state: LayerState) -> None:
        """Set the state of the memory of this kind."""
        self._states[kind] = state

    def __iter__(self) -> Iterator[LayerState]:
        return iter(self._states.values())

    def reorder(self, rows: Tensor) -> None:
        """Row i of the new batch is row rows[i] of the old one. rows: (n,) int64, or bool for the rows to keep.

        The states follow when they are next used, so that one transfer brings the rows to all layers.
        """
        if self._known:
            rows = rows.detach()
            self._orders.append(HostCopy(rows.to(rows.dtype if rows.dtype == torch.bool else torch.long, copy=True)))

    def repeat(self, times: int) -> None:
        """Repeat each row."""
        for state in self:
            state.select(torch.arange(state.batch).repeat_interleave(times))

    def check_crop(self, seen: int, length: int) -> None:
        """See `LayerState.check_crop`."""
        for state in self:
            state.check_crop(seen, length)

    def crop(self, seen: int, length: int) -> None:
        """See `LayerState.crop`."""
        for state in self:
            state.crop(seen, length)

    def reset(self) -> None:
        """Forget everything."""
        for state in self:
            state.reset()

    def record_past(self) -> None:
        """See `LayerState.record_past`."""
        for state in self:
            state.record_past()

    def detach(self) -> None:
        """Cut the graph."""
        for state in self:
            state.detach()

    def to(self, device: torch.device | str) -> None:
        """Move to another device; states come back by themselves where they are used."""
        for state in self:
            state.to(device)

    def offload(self) -> None:
        """Move to the CPU, also after each use from now on, until `prefetch`."""
        self.away = True
        self.to("cpu")

    def prefetch(self) -> None:
        """Keep states on the device that uses them from now on."""
        self.away = False

    def used(self) -> None:
        """Move a state back to the CPU after use, if the layer is offloaded."""
        if self.away:
            self.to("cpu")

    def buffers(self) -> list[Tensor]:
        """Every tensor that is held, one of several that share their memory."""
        return list({(t.data_ptr(), t.numel()): t for state in self for t in state.buffers() if t.numel()}.values())


def stateful(layer: Any) -> LayerStates:
    """Return the states of a layer of any cache, none at first.

    From now on a layer of transformers applies its own changes to its states too.
    """
    found: LayerStates | None = getattr(layer, STATES, None)
    if found is None:
        found = LayerStates()
        kind: Any = type(layer)
        layer.__class__ = _stateful(kind)
        setattr(layer, STATES, found)
    return found


def state_of(layer: Any, kind: str) -> LayerState | None:
    """Return a layer's state of the memory of this kind, without changing the layer."""
    found: LayerStates | None = getattr(layer, STATES, None)
    return None if found is None else found.get(kind)


class _Stateful(CacheLayerMixin):
    """The first base of a layer's new class: its methods apply changes to the states, and otherwise call the layer's own."""

    # So that transformers does not take this for its own class of the type.
    _layer_type = None
    memory_states: LayerStates

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.memory_states.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.memory_states.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.memory_states.reorder(indices)

    def crop(self, tokens_to_remove: int) -> None:
        seen = int(self.get_seq_length())
        after = seen + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, seen)
        self.memory_states.check_crop(seen, max(0, after))
        super().crop(tokens_to_remove)
        self.memory_states.crop(seen, int(self.get_seq_length()))

    def reset(self) -> None:
        super().reset()
        if isinstance(self, DynamicLayer) and self.is_initialized:
            # transformers before 5.18 fills keys and values with zeros, and counts these as tokens.
            self.keys = self.values = None
            self.is_initialized = False
        self.memory_states.reset()

    def activate_past_recording(self) -> None:
        record: Callable[[], None] | None = getattr(super(), "activate_past_recording", None)
        if record is not None:
            record()
        self.memory_states.record_past()

    def offload(self) -> None:
        super().offload()
        self.memory_states.offload()

    def prefetch(self) -> None:
        super().prefetch()
        self.memory_states.prefetch()

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        # The class was made while the program ran, so whoever unpickles makes it again.
        return _again, (type(self).__bases__[1],), self.__dict__


@cache
def _stateful(kind: Any) -> type:
    return type(kind.__name__, (_Stateful, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _again(kind: Any) -> Any:
    made: Any = _stateful(kind)
    return made.__new__(made)
