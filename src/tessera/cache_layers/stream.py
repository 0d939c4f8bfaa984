"""The stream of a Tensor Memory through a cache's sequences, kept on each layer of the cache: see `layer_states`.

A state cannot remove a token, so after a crop, as of a rejected draft, an earlier state reads the remaining tokens again: the
newest tokens are kept for that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tessera.cache_layers.group import RECORDED
from tessera.cache_layers.layer_states import LayerState
from tessera.devices import upload
from tessera.finite import FiniteCheck
from tessera.tensor_memory.tensor_memory_config import TensorMemoryConfig
from tessera.tensor_memory.tensor_memory_state import TensorMemoryState

#: Its kind in `LayerStates`.
TENSOR_MEMORY = "tensor_memory"

Run = Callable[[Tensor, TensorMemoryState | None], tuple[Tensor, TensorMemoryState]]
Groups = list[tuple[Tensor, TensorMemoryState | None]]

#: Number of newest tokens by which a cache can be cropped; `RECORDED` while it records its past or after a crop.
BACK = 64
#: Tokens of short calls between two kept states: after a crop at most these and one call's are read again.
STRIDE = 16


@dataclass(frozen=True, eq=False)
class Read:
    """Tokens that may be taken back.

    Attributes:
        start: how many came before them.
        groups: the state before them, see `Stream`.
        x: (batch, tokens, dim), what the memory read.
        real: (batch, tokens) bool on the CPU, False for padding; None: there is none.
    """

    start: int
    groups: Groups
    x: Tensor
    real: Tensor | None

    @property
    def stop(self) -> int:
        """Number of tokens up to the end of these."""
        return self.start + self.x.shape[1]

    def joined(self, x: Tensor, real: Tensor | None) -> Read:
        """Append further tokens."""
        both = None if self.real is None and real is None else torch.cat((_whole(self.x, self.real), _whole(x, real)), 1)
        return Read(self.start, self.groups, torch.cat((self.x.to(x.device), x), 1), both)

    def cut(self, length: int) -> Read:
        """Keep those that are among the first `length` tokens of the sequence."""
        n = length - self.start
        real = None if self.real is None else self.real[:, :n].clone()
        return Read(self.start, self.groups, self.x[:, :n].clone(), real)

    def to(self, device: torch.device | str) -> Read:
        """Return a copy on another device."""
        return replace(self, groups=_moved(self.groups, device), x=self.x.to(device))

    def buffers(self) -> list[Tensor]:
        """Every tensor that is held."""
        return [self.x, *([] if self.real is None else [self.real]), *_tensors(self.groups)]

    def select(self, rows: Tensor) -> Read:
        """See `Stream.select`."""
        real = None if self.real is None else self.real[rows]
        return Read(self.start, _select(self.groups, rows), self.x[upload(rows, self.x.device)], real)


class Stream(LayerState):
    """The state of one layer; rows with padding at different places have states of their own, so that padding is never written.

    Args:
        batch: rows.
        owner: name of the memory whose stream this is; empty where nothing is kept from call to call.
        config: that memory's configuration, or None likewise.

    Attributes:
        seen: tokens of a row so far, padding included.
        groups: row numbers, (n,) int64, and their state, None before their first token.
        log: the newest tokens, oldest first.
        behind: whether the last of them were cropped in part, and the rest has yet to be read again.
        kept: (batch, seen) bool on the CPU, False for padding; None: there has been none, or another layer's stream knows it.
        recording: whether the newest tokens may be cropped: the cache records its past, or has been cropped.
        finite: findings in a cache that has no check of its own, kept by the first layer with a memory.
    """

    def __init__(self, batch: int, owner: str = "", config: TensorMemoryConfig | None = None) -> None:
        self.owner, self.config = owner, config
        self.recording = False
        self.finite = FiniteCheck()
        self.begin(batch)

    def begin(self, batch: int) -> None:
        """Reset everything at the beginning of sequences."""
        self.finite.reset()
        self.batch = batch
        self.seen = 0
        self.groups: Groups = [(torch.arange(batch), None)]
        self.log: list[Read] = []
        self.behind = False
        self.kept: Tensor | None = None

    def note(self, count: int, real: Tensor | None) -> None:
        """Remember which of `count` new tokens are real. real: (batch, count) bool on the CPU; None: all."""
        if self.kept is None and real is None:
            return
        before = torch.ones(self.batch, self.seen, dtype=torch.bool) if self.kept is None else self.kept
        new = torch.ones(self.batch, count, dtype=torch.bool) if real is None else real
        self.kept = torch.cat((before, new), dim=1)

    def advance(self, run: Run, x: Tensor, real: Tensor | None, back: int = 0) -> Tensor:
        """Run the memory over the next tokens.

        Args:
            run: (tokens, state) -> (what is added, new state), for some of the rows.
            x: (batch, tokens, dim).
            real: (batch, tokens) bool on the CPU, False for padding; None: there is none.
            back: number of newest tokens by which a later crop may go back.

        Returns:
            (batch, tokens, dim), zero at padding.
        """
        if self.behind:
            owed = self.log[-1]
            self.seen, self.behind = owed.start, False
            with torch.no_grad():
                self._step(run, owed.x.to(x.device), owed.real)
        if back == 0:
            self.log = []
            return self._step(run, x, real)
        count = x.shape[1]
        # The first call of assisted generation comes before anything announces drafts, and has one sequence. What is kept
        # beyond `back` for it is dropped at the next call.
        kept = RECORDED if self.seen == 0 and self.batch == 1 else back
        ends = sorted({max(0, count - kept), max(0, count - back), count} - {0})
        parts = []
        for start, stop in zip([0, *ends], ends, strict=False):
            part, own = x[:, start:stop], None if real is None else real[:, start:stop]
            if start < count - kept:
                self.log = []
            else:
                self._note(part, own, kept)
            parts.append(self._step(run, part, own))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _step(self, run: Run, x: Tensor, real: Tensor | None) -> Tensor:
        self.seen += x.shape[1]
        if real is None and len(self.groups) == 1:
            rows, state = self.groups[0]
            # A single group holds the rows in order.
            out, state = run(x, state)
            self.groups = [(rows, state)]
            return out
        out, groups = torch.zeros_like(x), []
        for rows, state in self.groups:
            for where in _alike(rows, real):
                members = rows[where]
                own = state if len(where) == len(rows) or state is None else state.select(where)
                places = torch.arange(x.shape[1]) if real is None else real[members[0]].nonzero().flatten()
                if len(places):
                    at = upload(members, x.device)[:, None], upload(places, x.device)
                    added, own = run(x[at], own)
                    out = out.index_put(at, added)
                groups.append((members, own))
        self.groups = groups
        return out

    def _note(self, x: Tensor, real: Tensor | None, back: int) -> None:
        # Copies: the layer goes on with the one, and the other may be a view of the caller's own mask.
        x, real = x.detach().clone(), None if real is None else real.clone()
        if self.log and self.log[-1].x.shape[1] + x.shape[1] <= STRIDE:
            self.log[-1] = self.log[-1].joined(x, real)
        else:
            self.log.append(Read(self.seen, self.groups, x, real))
        while self.log[-1].stop - self.log[0].stop >= back:
            del self.log[0]

    @property
    def earliest(self) -> int:
        """The smallest length above 0 that this can be cropped to."""
        return self.log[0].start if self.log else self.seen

    # Changes of its layer

    def check_crop(self, seen: int, length: int) -> None:
        """See `LayerState`."""
        # A stream that has seen other tokens is stale already, and will be refused at its next use.
        if self.seen == seen and 0 < length < self.earliest:
            raise ValueError(
                f"this cache cannot be cropped from {seen} to {length} tokens, for its Tensor Memory goes back to "
                f"{self.earliest} at the earliest, and in gradient mode not at all: call cache.activate_past_recording() "
                f"after its first call, for {RECORDED} tokens from then on, draft fewer tokens, or begin with a new cache"
            )

    def crop(self, seen: int, length: int) -> None:
        """See `LayerState`."""
        self.recording = True  # further drafts are likely
        if self.seen != seen:
            return
        if not length:
            self.begin(self.batch)
            return
        while self.log and self.log[-1].start >= length:
            self.groups, self.behind = self.log.pop().groups, False
        if length < self.seen and self.log and length < self.log[-1].stop:
            self.log[-1] = self.log[-1].cut(length)
            self.groups, self.behind = self.log[-1].groups, True
        self.seen = length
        self.kept = None if self.kept is None else padded(self.kept[:, :length].clone())

    def select(self, rows: Tensor) -> None:
        """See `LayerState`."""
        self.groups, self.batch = _select(self.groups, rows), len(rows)
        self.log = [read.select(rows) for read in self.log]
        self.kept = None if self.kept is None else padded(self.kept[rows])

    def reset(self) -> None:
        """See `LayerState`."""
        self.begin(0)

    def record_past(self) -> None:
        """See `LayerState`."""
        self.recording = True

    def detach(self) -> None:
        """Cut the graph."""
        self.groups = [(rows, None if state is None else state.detach()) for rows, state in self.groups]

    def to(self, device: torch.device | str) -> None:
        """See `LayerState`."""
        self.groups = _moved(self.groups, device)
        self.log = [read.to(device) for read in self.log]

    def buffers(self) -> list[Tensor]:
        """See `LayerState`."""
        held = [tensor for read in self.log for tensor in read.buffers()]
        return [*_tensors(self.groups), *held, *([] if self.kept is None else [self.kept])]


class CropGuard(LayerState):
    """A guard on the first layer of a cache of transformers, which is cropped first: it refuses what later layers would refuse.

    Args:
        stream: the stream of a later layer.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def check_crop(self, seen: int, length: int) -> None:
        """See `LayerState`."""
        self.stream.check_crop(seen, length)


def padded(kept: Tensor) -> Tensor | None:
    """Return which tokens are real, or None where all remaining ones are."""
    return None if bool(kept.all()) else kept


def _moved(groups: Groups, device: torch.device | str) -> Groups:
    return [(rows, None if state is None else state.to(device)) for rows, state in groups]


def _tensors(groups: Groups) -> list[Tensor]:
    states = [tensor for _, state in groups if state is not None for tensor in state.tensors().values()]
    return [*(rows for rows, _ in groups), *states]


def _whole(x: Tensor, real: Tensor | None) -> Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool) if real is None else real


def _select(groups: Groups, rows: Tensor) -> Groups:
    found = []
    for own, state in groups:
        new, old = (rows[:, None] == own).nonzero().unbind(1)
        if len(new):
            found.append((new.clone(), None if state is None else state.select(old)))
    return found


def _alike(rows: Tensor, real: Tensor | None) -> list[Tensor]:
    """Split `rows`, as indices into it, into parts with padding at the same places."""
    if real is None:
        return [torch.arange(len(rows))]
    kinds, which = real[rows].unique(dim=0, return_inverse=True)
    return [(which == kind).nonzero().flatten() for kind in range(len(kinds))]
