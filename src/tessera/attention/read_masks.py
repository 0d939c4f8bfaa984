"""What the mask of a call says of documents, for attention without tiers: `Documents`, and what each query may see.

What a mask that was made from padding says is known from the padding; any other is evaluated on its device, and the results
come in one transfer. Layers that are given the same mask in a call share what was read from it.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import pad

from tessera.attention.documents import READS, Documents, MaskReading, SlidingWindow, within
from tessera.cache_layers.new_tokens import BIASED, shown
from tessera.cache_layers.padding_mask import by_padding
from tessera.devices import upload
from tessera.finite import FiniteCheck
from tessera.readback import HostCopy

#: A mask of at most so many numbers for each head is evaluated on the host: layers of different kinds share its transfer.
FEW = 1 << 20
PADDING_SHOWN = "the attention mask shows slots that were padding when they came; padding stays padding"


class _Request(NamedTuple):
    """What a layer asks for besides the mask, see `read_documents`."""

    batch: int
    queries: int
    limits: SlidingWindow
    before: Documents | None
    memory: bool

    def same(self, other: _Request) -> bool:
        """Whether a reading for `other` answers this too."""
        same = self.before is other.before or (self.before is not None and self.before.same(other.before))
        return same and self._replace(before=None) == other._replace(before=None)


class _Call:
    """What has been read in a call of a model; masks are compared by identity."""

    def __init__(self) -> None:
        self.readings: list[tuple[weakref.ref[Tensor], _Request, MaskReading]] = []
        self.copies: list[tuple[weakref.ref[Tensor], HostCopy]] = []

    def copy(self, mask: Tensor) -> HostCopy:
        """What a mask shows some head and all heads, and whether it does more than hide, in one row."""
        for of_mask, copy in self.copies:
            if of_mask() is mask:
                return copy
        seen = shown(mask)
        copy = HostCopy(torch.cat((seen.any(1).flatten(), seen.all(1).flatten(), _biased(mask)[None])))
        self.copies.append((weakref.ref(mask), copy))
        return copy


class _Calls(threading.local):
    """The calls of models that this thread is in, innermost last."""

    def __init__(self) -> None:
        self.each: list[_Call] = []


_CALLS = _Calls()


def share_readings(decoder: nn.Module) -> list[Any]:
    """Let the layers of a decoder share what they read from the mask of a call. Returns its hooks, which can be removed."""
    return [decoder.register_forward_pre_hook(_begin, prepend=True), decoder.register_forward_hook(_end, always_call=True)]


def _begin(*_: Any) -> None:
    if not torch.compiler.is_compiling():
        _CALLS.each.append(_Call())


def _end(*_: Any) -> None:
    if not torch.compiler.is_compiling() and _CALLS.each:
        _CALLS.each.pop()


def read_documents(
    mask: Tensor | None,
    query: Tensor,
    slots: int,
    limits: SlidingWindow,
    before: Documents | None = None,
    memory: bool = False,
    finite: FiniteCheck | None = None,
) -> MaskReading:
    """Find the document of each slot of a call.

    Args:
        mask: attention mask of the call, (batch or 1, heads or 1, queries, slots); None: plain causality.
        query: (batch, heads, tokens, head_dim) of the call.
        slots: all up to now.
        limits: the layer's.
        before: documents of the slots before the call; None: those that the mask shows are one document.
        memory: whether a memory holds all that left its document's window.
        finite: read with the mask; None: nothing.

    Raises:
        ValueError: for an additive mask that does more than hide, or one that shows what was padding when it came; and, where
            there is a memory, for one that hides absorbed tokens or shows another document. See also `FiniteCheck.read`.
    """
    batch, queries = query.shape[0], query.shape[2]
    if mask is None:
        if finite is not None:
            finite.read()
        return MaskReading(Documents(batch, slots) if before is None else before.followed(queries), None, queries)
    return _read(mask, _Request(batch, queries, limits, before, memory), finite)


@torch.compiler.disable(reason=READS)
def note_mask(mask: Tensor | None) -> None:
    """Note that the mask of this call will be read, so that whatever is read before it comes in the same transfer."""
    if mask is None or not _CALLS.each or (by_padding(mask) and mask.window is None):
        return
    if _is_small(mask):
        _CALLS.each[-1].copy(mask)


def _is_small(mask: Tensor) -> bool:
    return mask.shape[0] * mask.shape[-2] * mask.shape[-1] <= FEW


@torch.compiler.disable(reason=READS)
def _read(mask: Tensor, asked: _Request, finite: FiniteCheck | None) -> MaskReading:
    call = _CALLS.each[-1] if _CALLS.each else _Call()
    for of_mask, answered, reading in call.readings:
        if of_mask() is mask and asked.same(answered):
            if finite is not None:
                finite.read()
            return reading
    if by_padding(mask) and mask.window is None:
        if finite is not None:
            finite.read(*([] if mask.padding is None else [mask.padding]))
        reading = _of_padding(mask, mask.real_slots(), asked)
    else:
        reading = _looked_at(mask, call, asked, finite)
    call.readings.append((weakref.ref(mask), asked, reading))
    return reading


def _of_padding(mask: Tensor, real: NDArray[np.bool_] | None, asked: _Request) -> MaskReading:
    """As `_looked_at`, of a mask by which a query sees the slots up to its own that are no padding."""
    batch, queries, limits, before, memory = asked
    slots = mask.shape[-1]
    past = slots - queries
    real = np.ones((batch, slots), dtype=np.bool_) if real is None else np.broadcast_to(real, (batch, slots))
    begins = real[:, past:] & (real.cumsum(1)[:, past:] == 1)
    old = real[:, :past].astype(np.int64) - 1 if before is None else before.number
    if ((old < 0) & real[:, :past]).any():
        raise ValueError(PADDING_SHOWN)
    of = Documents(batch, slots, _numbers(old, real[:, past:], begins))
    if memory and not of.single:
        new = of.number[:, past:]
        # Documents are consecutive, so whoever sees another sees the first slot that is shown.
        first = np.take_along_axis(of.number, real.argmax(1)[:, None], 1)
        hidden = (of.number >= 0) & ~real & (of.place >= limits.sink)
        rows, at = np.nonzero(hidden)
        late = of.place[rows, at, None] <= of.place[rows, past:] - limits.window
        absorbed = late & (of.number[rows, at, None] == of.number[rows, past:])
        _check(bool(((new >= 0) & (new != first)).any()), bool(absorbed.any()), limits.window)
    return MaskReading(of, mask, queries)


def _brought(copy: HostCopy, finite: FiniteCheck | None) -> NDArray[Any]:
    """A copy on the host, brought together with the findings of a check."""
    if finite is not None:
        finite.read(copy)
    return copy.get()


def _biased(mask: Tensor) -> Tensor:
    """Whether a mask does more than hide, () bool."""
    if not mask.is_floating_point():
        return torch.zeros((), dtype=torch.bool, device=mask.device)
    return ~((mask == 0) | (mask <= torch.finfo(mask.dtype).min / 2)).all()


def _looked_at(mask: Tensor, call: _Call, asked: _Request, finite: FiniteCheck | None) -> MaskReading:
    batch, queries, limits, before, memory = asked
    rows, slots = mask.shape[0], mask.shape[-1]
    past = slots - queries
    brought = call.copy(mask) if _is_small(mask) else None
    if brought is not None:
        told = torch.as_tensor(_brought(brought, finite))
        some, every = told[:-1].view(2, rows, queries, slots).unbind()
        biased = told[-1]
    else:
        some, every, biased = shown(mask).any(1), shown(mask).all(1), _biased(mask)
    device = some.device
    no = torch.zeros((), dtype=torch.bool, device=device)
    seen = some.expand(batch, -1, -1)
    shows_old, real = seen[..., :past].any(1), seen[..., past:].any(1)
    old = shows_old.long() - 1 if before is None else upload(torch.as_tensor(before.number), device)
    earlier = seen & torch.ones((queries, slots), dtype=torch.bool, device=device).tril(past - 1)
    begins = real & ~earlier.any(-1)
    last = old.amax(1, keepdim=True) if past else old.new_full((batch, 1), -1)
    number = torch.cat((old, (last + begins.cumsum(1)).masked_fill(~real, -1)), dim=1)
    count = (number >= 0).cumsum(1) - 1
    place = count - count.masked_fill(number <= pad(number, (1, -1), value=-1).cummax(1).values, 0).cummax(1).values
    other = absorbed = no
    if memory:
        key, query = number[:, None, None], number[:, None, past:, None]
        other = (seen[:, None] & (query >= 0) & (key >= 0) & (query != key)).any()
        left = place[:, None, None] <= place[:, None, past:, None] - limits.window
        kept = place[:, None, None] < limits.sink
        absorbed = ((query >= 0) & (query == key) & left & ~kept & ~every[:, None]).any()
    blocks = []
    for first in range(past, slots, limits.window):
        own = slice(first, first + limits.window)
        near = within(number[:, own], place[:, own], number, place, limits)
        blocks.append((near & seen[:, None, first - past : first - past + limits.window]).any(dim=(0, 1, 2)))
    flags = torch.stack((biased, ((old < 0) & shows_old).any(), other, absorbed))
    found = torch.cat([flags, *(x.flatten() for x in (shows_old, real, begins, *blocks))])
    said: NDArray[Any] = found.numpy() if brought is not None else _brought(HostCopy(found), finite)
    if said[0]:
        raise ValueError(BIASED)
    if said[1] and before is not None:
        raise ValueError(PADDING_SHOWN)
    _check(bool(said[2]), bool(said[3]), limits.window)
    sizes = np.cumsum([4, batch * past, batch * queries, batch * queries, *[slots] * len(blocks)])
    old_shown, new, begun, *columns = np.split(said, sizes[:-1])[1:]
    old_host = old_shown.reshape(batch, past).astype(np.int64) - 1 if before is None else before.number
    of = Documents(batch, slots, _numbers(old_host, new.reshape(batch, queries), begun.reshape(batch, queries)))
    reading = MaskReading(of, mask, queries)
    reading.see(limits, [block.nonzero()[0] for block in columns])
    return reading


def _numbers(old: NDArray[np.int64], real: NDArray[np.bool_], begins: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The number of the document of each slot, of the old ones and of the new ones' properties."""
    last = old.max(1, keepdims=True, initial=-1)
    return np.concatenate((old, np.where(real, last + begins.cumsum(1), -1)), 1)


def _check(other: bool, absorbed: bool, window: int) -> None:
    """Refuse a mask that a memory behind a window cannot follow, because it holds all that left its document's window."""
    if other:
        raise ValueError(
            "the attention mask shows a token another document than its own; a Tensor Cache begins anew with each document, so "
            "run such rows without one (tessera.detach)"
        )
    if absorbed:
        raise ValueError(
            f"the attention mask hides tokens that have left the window of {window}, and the Tensor Cache has absorbed them; "
            "it can hide padding and whole documents only, so run such rows without one (tessera.detach)"
        )
