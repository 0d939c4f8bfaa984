"""What a Tensor Memory has read of the sequences of a cache, kept on the cache and led along with it.

It is on the cache because that is what a caller passes on from call to call, copies and throws away: transformers' own, or
`tessera.Cache`. A state cannot forget a token, so what has to be taken back, such as a rejected draft, is read again from an
earlier state: the newest tokens are kept for that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tessera.cache.cache_layer import STREAMS
from tessera.cache.group import RECORDED
from tessera.tensor_memory.state import TensorMemoryState

Run = Callable[[Tensor, TensorMemoryState | None], tuple[Tensor, TensorMemoryState]]
Groups = list[tuple[Tensor, TensorMemoryState | None]]

#: So many of the newest tokens a cache can be cropped by, and `RECORDED` while it records its past or has been cropped.
BACK = 64
#: Tokens of short calls between two states that are kept, so that no more are read again than these and one call's.
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
        """How many tokens there are with these."""
        return self.start + self.x.shape[1]

    def joined(self, x: Tensor, real: Tensor | None) -> Read:
        """These and more behind them."""
        both = None if self.real is None and real is None else torch.cat((_whole(self.x, self.real), _whole(x, real)), 1)
        return Read(self.start, self.groups, torch.cat((self.x, x), 1), both)

    def cut(self, length: int) -> Read:
        """Those of them that are among the first `length` tokens of all."""
        n = length - self.start
        return Read(self.start, self.groups, self.x[:, :n], None if self.real is None else self.real[:, :n])

    def select(self, rows: Tensor) -> Read:
        """See `Stream.select`."""
        real = None if self.real is None else self.real[rows]
        return Read(self.start, _select(self.groups, rows), self.x[rows.to(self.x.device)], real)


class Stream:
    """The state of one layer: rows that have padding at different places are apart, so that it is never written.

    Attributes:
        batch: rows.
        seen: tokens of a row so far, padding included.
        groups: row numbers, (n,) int64, and their state, None before their first token.
        log: the newest tokens, oldest first.
        behind: the last of them have been taken back in part; what is left of those has yet to be read again.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.seen = 0
        self.groups: Groups = [(torch.arange(batch), None)]
        self.log: list[Read] = []
        self.behind = False

    def advance(self, run: Run, x: Tensor, real: Tensor | None, back: int = 0) -> Tensor:
        """Run the memory over the next tokens.

        Args:
            run: (tokens, state) -> (what is added, new state), for some of the rows.
            x: (batch, tokens, dim).
            real: (batch, tokens) bool on the CPU, False for padding; None: there is none.
            back: so many of the newest tokens can be taken back afterwards.

        Returns:
            (batch, tokens, dim), zero at padding.
        """
        if self.behind:
            owed = self.log[-1]
            self.seen, self.behind = owed.start, False
            with torch.no_grad():
                self._step(run, owed.x, owed.real)
        if back == 0:
            self.log = []
            return self._step(run, x, real)
        count = x.shape[1]
        # The first call of generation with drafts comes before anything says that there are any, and is of one sequence. What
        # is kept beyond `back` for it goes with the next call.
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
                    at = members.to(x.device)[:, None], places.to(x.device)
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
        """The fewest tokens that this can be cropped to, but for none at all."""
        return self.log[0].start if self.log else self.seen

    def crop(self, length: int) -> None:
        """Take tokens back until `length` are left, which are no fewer than `earliest`."""
        while self.log and self.log[-1].start >= length:
            self.groups, self.behind = self.log.pop().groups, False
        if length < self.seen and self.log and length < self.log[-1].stop:
            self.log[-1] = self.log[-1].cut(length)
            self.groups, self.behind = self.log[-1].groups, True
        self.seen = length

    def select(self, rows: Tensor) -> None:
        """Row i of the new batch is row rows[i] of this one. rows: (n,) int64 on the CPU."""
        self.groups, self.batch = _select(self.groups, rows), len(rows)
        self.log = [read.select(rows) for read in self.log]

    def detach(self) -> None:
        """Cut the graph."""
        self.groups = [(rows, None if state is None else state.detach()) for rows, state in self.groups]


class Streams:
    """The states of a cache, by layer.

    Attributes:
        owner: names the memory that they are of.
        layers: by index.
        kept: (batch, tokens so far) bool on the CPU, False for padding; None: there has been none.
        recording: the newest tokens may have to be taken back, for the cache was told so, or has been cropped.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.layers: dict[int, Stream] = {}
        self.kept: Tensor | None = None
        self.recording = False

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
                "memory or loaded from a file, or a call stopped half-way; begin with a new cache, or call cache.reset()"
            )
        if found.batch != batch:
            raise ValueError(f"this cache is of {found.batch} sequences, and {batch} were given")
        return found

    def note(self, batch: int, past: int, count: int, real: Tensor | None) -> None:
        """Remember which of `count` new tokens behind `past` are real."""
        before = self.kept if past else None
        if before is None and real is None:
            self.kept = None
            return
        before = torch.ones(batch, past, dtype=torch.bool) if before is None else before
        new = torch.ones(batch, count, dtype=torch.bool) if real is None else real
        self.kept = torch.cat((before, new), dim=1)

    def back(self, cache: Any) -> int:
        """So many tokens the layers must be able to take back. None while gradients are kept, which would be lost."""
        if torch.is_grad_enabled():
            return 0
        # Only some kinds of layers are told that the past is recorded.
        recording = self.recording or any(getattr(layer, "record_past", False) for layer in cache.layers)
        return RECORDED if recording else BACK

    def select(self, rows: Callable[[int], Tensor]) -> None:
        """Change the rows; `rows` gives, for a number of old ones, the old one of each new one."""
        if self.kept is not None:
            self.kept = _padded(self.kept[rows(len(self.kept))])
        for stream in self.layers.values():
            stream.select(rows(stream.batch))

    def check_crop(self, cache: Any, tokens_to_remove: int) -> None:
        """Refuse what cannot be taken back.

        Raises:
            ValueError: if it cannot.
        """
        for index, stream in self.layers.items():
            if stream.seen != cache.get_seq_length(index):
                # It has gone out of use already, and will be refused there.
                continue
            length = stream.seen + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, stream.seen)
            if 0 < length < stream.earliest:
                raise ValueError(
                    f"this cache cannot be cropped from {stream.seen} to {length} tokens, for its Tensor Memory goes back to "
                    f"{stream.earliest} at the earliest, and in gradient mode not at all: call cache.activate_past_recording() "
                    f"after its first call, for {RECORDED} tokens from then on, draft fewer tokens, or begin with a new cache"
                )

    def crop(self, cache: Any, seen: dict[int, int]) -> None:
        """Follow a cache whose layers had `seen` tokens before it was cropped."""
        # More drafts will follow.
        self.recording = True
        for index, stream in list(self.layers.items()):
            length = int(cache.get_seq_length(index))
            if stream.seen != seen[index]:
                continue
            if length:
                stream.crop(length)
            else:
                del self.layers[index]
            if self.kept is not None:
                self.kept = _padded(self.kept[:, :length])


def _padded(kept: Tensor) -> Tensor | None:
    """Which tokens were real, or None where all that are left were."""
    return None if bool(kept.all()) else kept


class _Along:
    """A method of a cache that changes its rows or its length, and those of its `Streams` alike."""

    def __init__(self, cache: Any, name: str) -> None:
        # Not the cache itself, which would keep itself alive until the garbage is collected.
        self.cache, self.name = weakref.ref(cache), name

    def __reduce__(self) -> tuple[Any, ...]:
        return _Along, (self.cache(), self.name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = self.cache()
        streams: Streams = getattr(cache, STREAMS)
        given: Any = next(iter((*args, *kwargs.values())), None)
        if self.name == "crop":
            streams.check_crop(cache, given)
        seen = {index: int(cache.get_seq_length(index)) for index in streams.layers}  # type: ignore[union-attr]
        result = getattr(type(cache), self.name)(cache, *args, **kwargs)
        if self.name == "crop":
            streams.crop(cache, seen)
        elif self.name == "activate_past_recording":
            streams.recording = True
        elif self.name == "reset":
            streams.layers, streams.kept = {}, None
        elif self.name == "detach":
            for stream in streams.layers.values():
                stream.detach()
        elif self.name == "batch_repeat_interleave":
            streams.select(lambda batch: torch.arange(batch).repeat_interleave(given))
        else:
            streams.select(lambda batch: torch.arange(batch)[torch.as_tensor(given).cpu()])
        return result


#: Methods of caches after which the streams must be led along.
ALONG = (
    *("reorder_cache", "batch_repeat_interleave", "batch_select_indices", "detach"),
    *("crop", "reset", "activate_past_recording"),
)


def streams_of(cache: Any, owner: str) -> Streams:
    """The states that a cache keeps for the memory named `owner`, new ones where it keeps none."""
    found: Streams | None = getattr(cache, STREAMS, None)
    if found is None or found.owner != owner:
        found = Streams(owner)
        setattr(cache, STREAMS, found)
        for name in ALONG:
            if hasattr(type(cache), name):
                setattr(cache, name, _Along(cache, name))
    return found


def advance_documents(run: Run, x: Tensor, real: Tensor | None, begins: Tensor) -> Tensor:
    """Run the memory over rows of several documents, each of which is read by itself.

    Args:
        run: see `Stream.advance`.
        x: (batch, tokens, dim).
        real: (batch, tokens) bool on the CPU, False for padding; None: there is none.
        begins: (batch, tokens) bool on the CPU, True where a document begins behind another.

    Returns:
        (batch, tokens, dim), zero at padding.
    """
    batch, tokens, _ = x.shape
    places = torch.arange(batch * tokens)
    if real is not None:
        places = places[real.flatten()]
    number = begins.cumsum(1) + torch.arange(batch)[:, None] * (tokens + 1)
    _, lengths = number.flatten()[places].unique_consecutive(return_counts=True)
    documents = places.split(lengths.tolist())
    flat, out = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
    # Documents of about one length run side by side, with less than as much again behind them, which nothing real sees.
    for size in sorted({len(document).bit_length() for document in documents}):
        members = [document for document in documents if len(document).bit_length() == size]
        at = pad_sequence(members, batch_first=True)
        own = torch.arange(at.shape[1]) < torch.tensor([len(document) for document in members])[:, None]
        added, _ = run(flat[at.to(x.device)], None)
        out = out.index_put((at[own].to(x.device),), added[own.to(x.device)])
    return out.view_as(x)


def _whole(x: Tensor, real: Tensor | None) -> Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool) if real is None else real


def _select(groups: Groups, rows: Tensor) -> Groups:
    found = []
    for own, state in groups:
        new, old = (rows[:, None] == own).nonzero().unbind(1)
        if len(new):
            found.append((new, None if state is None else state.select(old)))
    return found


def _alike(rows: Tensor, real: Tensor | None) -> list[Tensor]:
    """Parts of `rows`, as places in it, whose padding is at the same places."""
    if real is None:
        return [torch.arange(len(rows))]
    kinds, which = real[rows].unique(dim=0, return_inverse=True)
    return [(which == kind).nonzero().flatten() for kind in range(len(kinds))]
