"""What a Tensor Memory has read of the sequences of a cache, kept on the cache and led along with it.

It is on the cache because that is what a caller passes on from call to call, copies and throws away: transformers' own, or
`tessera.Cache`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tessera.cache.layer import STREAMS
from tessera.spatial.state import TensorMemoryState

Run = Callable[[Tensor, TensorMemoryState | None], tuple[Tensor, TensorMemoryState]]


class Stream:
    """The state of one layer: rows that have padding at different places are apart, so that it is never written.

    Attributes:
        batch: rows.
        seen: tokens of a row so far, padding included.
        groups: row numbers, (n,) int64, and their state, None before their first token.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.seen = 0
        self.groups: list[tuple[Tensor, TensorMemoryState | None]] = [(torch.arange(batch), None)]

    def advance(self, run: Run, x: Tensor, real: Tensor | None) -> Tensor:
        """Run the memory over the next tokens.

        Args:
            run: (tokens, state) -> (what is added, new state), for some of the rows.
            x: (batch, tokens, dim).
            real: (batch, tokens) bool on the CPU, False for padding; None: there is none.

        Returns:
            (batch, tokens, dim), zero at padding.
        """
        if real is None and len(self.groups) == 1:
            rows, state = self.groups[0]
            # A single group holds the rows in order.
            out, state = run(x, state)
            self.groups = [(rows, state)]
            self.seen += x.shape[1]
            return out
        out, groups = torch.zeros_like(x), []
        for rows, state in self.groups:
            for where in _alike(rows, real):
                members = rows[where]
                own = state if len(where) == len(rows) or state is None else state.select(where)
                places = torch.arange(x.shape[1]) if real is None else real[members[0]].nonzero().flatten()
                if len(places):
                    at = members.to(x.device)[:, None], places.to(x.device)
                    added, own = run(x[at], own)
                    out = out.index_put(at, added)
                groups.append((members, own))
        self.groups = groups
        self.seen += x.shape[1]
        return out

    def select(self, rows: Tensor) -> None:
        """Row i of the new batch is row rows[i] of this one. rows: (n,) int64 on the CPU."""
        groups = []
        for own, state in self.groups:
            new, old = (rows[:, None] == own).nonzero().unbind(1)
            if len(new):
                groups.append((new, None if state is None else state.select(old)))
        self.groups, self.batch = groups, len(rows)

    def detach(self) -> None:
        """Cut the graph."""
        self.groups = [(rows, None if state is None else state.detach()) for rows, state in self.groups]


class Streams:
    """The states of a cache, by layer.

    Attributes:
        owner: names the memory that they are of.
        layers: by index.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.layers: dict[int, Stream] = {}

    def layer(self, index: int, batch: int, past: int) -> Stream:
        """The state of a layer whose keys and values are of `past` tokens.

        Raises:
            ValueError: if it has read something else.
        """
        found = self.layers.get(index)
        if past == 0:
            # The cache is new, or has been reset.
            found = self.layers[index] = Stream(batch)
        seen = 0 if found is None else found.seen
        if found is None or seen != past:
            raise ValueError(
                f"this cache holds {past} tokens, of which the Tensor Memory has read {seen}: it was filled without the "
                "memory, loaded from a file, or cropped. What has been written cannot be taken back; begin with a new cache"
            )
        if found.batch != batch:
            raise ValueError(f"this cache is of {found.batch} sequences, and {batch} were given")
        return found


class _Along:
    """A method of a cache that changes its rows, and those of its `Streams` alike."""

    def __init__(self, cache: Any, name: str) -> None:
        self.cache, self.name = cache, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = getattr(type(self.cache), self.name)(self.cache, *args, **kwargs)
        given: Any = next(iter((*args, *kwargs.values())), None)
        for stream in getattr(self.cache, STREAMS).layers.values():
            if self.name == "detach":
                stream.detach()
            elif self.name == "batch_repeat_interleave":
                stream.select(torch.arange(stream.batch).repeat_interleave(given))
            else:
                stream.select(torch.arange(stream.batch)[torch.as_tensor(given).cpu()])
        return result


def streams_of(cache: Any, owner: str) -> Streams:
    """The states that a cache keeps for the memory named `owner`, new ones where it keeps none."""
    found: Streams | None = getattr(cache, STREAMS, None)
    if found is None or found.owner != owner:
        found = Streams(owner)
        setattr(cache, STREAMS, found)
        for name in ("reorder_cache", "batch_repeat_interleave", "batch_select_indices", "detach"):
            if hasattr(type(cache), name):
                setattr(cache, name, _Along(cache, name))
    return found


def _alike(rows: Tensor, real: Tensor | None) -> list[Tensor]:
    """Parts of `rows`, as places in it, whose padding is at the same places."""
    if real is None:
        return [torch.arange(len(rows))]
    kinds, which = real[rows].unique(dim=0, return_inverse=True)
    return [(which == kind).nonzero().flatten() for kind in range(len(kinds))]
