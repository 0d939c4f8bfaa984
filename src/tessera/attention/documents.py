"""The documents within the rows of a call, for attention without tiers, as the host knows them, and who sees what of them."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.cache_layers.new_tokens import shown, whole
from tessera.devices import upload

#: Why torch.compile breaks its graph here.
READS = "what a mask says is evaluated on the host"


class SlidingWindow(NamedTuple):
    """The limits of a model's attention: the newest `window` tokens, the query's own included, and the first `sink`."""

    window: int
    sink: int


class Documents:
    """The document of every slot of a batch.

    Args:
        batch, slots: sizes.
        number: (batch, slots) int64, of the document, counted within its row; -1 for padding; None: every row is one document
            without padding.
    """

    def __init__(self, batch: int, slots: int, number: NDArray[np.int64] | None = None) -> None:
        self.batch, self.slots = batch, slots
        self._number = None if number is None or not number.any() else number

    @property
    def single(self) -> bool:
        """Whether every row is one document without padding."""
        return self._number is None

    @cached_property
    def number(self) -> NDArray[np.int64]:
        """(batch, slots), of the document, counted within its row; -1 for padding."""
        return np.zeros((self.batch, self.slots), dtype=np.int64) if self._number is None else self._number

    @cached_property
    def count(self) -> NDArray[np.int64]:
        """(batch, slots), how many tokens of its row there are up to a slot."""
        return (self.number >= 0).cumsum(1)

    @cached_property
    def place(self) -> NDArray[np.int64]:
        """(batch, slots), of a token in its document."""
        count = self.count - 1
        before = np.full_like(self.number, -1)
        np.maximum.accumulate(self.number[:, :-1], axis=1, out=before[:, 1:])
        first = np.where(self.number > before, count, 0)
        return np.asarray(count - np.maximum.accumulate(first, axis=1))

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """(batch, slots), the slots of real tokens, in order, and then those of padding."""
        return (self.number < 0).argsort(1, kind="stable")

    def same(self, other: Documents | None) -> bool:
        """Whether these are the documents of `other`."""
        if other is None or (self.batch, self.slots, self.single) != (other.batch, other.slots, other.single):
            return False
        return other is self or self.single or np.array_equal(self.number, other.number)

    def select(self, rows: Tensor) -> Documents:
        """Row i of the new batch is row rows[i] of this one. rows: (n,) int64 on the CPU."""
        return Documents(len(rows), self.slots, None if self.single else self.number[rows.numpy()])

    def first(self, slots: int) -> Documents:
        """The documents of the first `slots` slots."""
        return Documents(self.batch, slots, None if self.single else self.number[:, :slots].copy())

    def followed(self, tokens: int) -> Documents:
        """These, and further tokens of the newest document of each row."""
        if self.single:
            return Documents(self.batch, self.slots + tokens)
        new = self.number.max(1, keepdims=True, initial=-1).clip(min=0).repeat(tokens, 1)
        return Documents(self.batch, self.slots + tokens, np.concatenate((self.number, new), 1))

    def begin_after(self, slots: int) -> bool:
        """Whether a document behind another begins at a slot from `slots` on."""
        return not self.single and bool(((self.place == 0) & (self.number > 0))[:, slots:].any())

    def buffers(self) -> list[Tensor]:
        """Every tensor that is held."""
        return [] if self._number is None else [torch.as_tensor(self._number)]


class _Block(NamedTuple):
    """Some queries of a call on a device: the first and last of their slots, and what they may see.

    Attributes:
        first, stop: slots of the queries.
        columns: (columns,) int64, slots that they may see.
        number, place: (batch, queries) int64, of the queries, see `Documents`.
        key_number, key_place: (batch, columns) int64, of the columns.
    """

    first: int
    stop: int
    columns: Tensor
    number: Tensor
    place: Tensor
    key_number: Tensor
    key_place: Tensor


class MaskReading:
    """What a call's mask says.

    Attributes:
        of: the documents of all slots, the call's own included.
    """

    def __init__(self, of: Documents, mask: Tensor | None, queries: int) -> None:
        self.of = of
        self._mask, self._queries = mask, queries
        self._columns: dict[SlidingWindow, list[NDArray[np.int64]]] = {}
        self._blocks: dict[tuple[SlidingWindow, torch.device], list[_Block]] = {}

    @property
    def plain(self) -> bool:
        """Whether queries see all tokens up to their own, and no token is padding."""
        return self._mask is None and self.of.single

    def see(self, limits: SlidingWindow, columns: list[NDArray[np.int64]]) -> None:
        """Note, for each block of `limits.window` queries, the slots that its queries may see."""
        self._columns[limits] = columns

    @torch.compiler.disable(reason=READS)
    def block(self, limits: SlidingWindow, device: torch.device, number: int) -> tuple[Tensor, Tensor]:
        """Return the slots that a block of `limits.window` queries may see, and whether each of them does.

        Returns:
            (columns,) int64, and (batch, heads or 1, queries, columns) bool; a query that is padding sees all of them.
        """
        key = limits, device
        if key not in self._blocks:
            columns = self._columns.get(limits) or _columns(self.of, self._queries, limits)
            past = self.of.slots - self._queries
            self._blocks[key] = [self._on(past + n * limits.window, own, limits, device) for n, own in enumerate(columns)]
        own = self._blocks[key][number]
        seen = within(own.number, own.place, own.key_number, own.key_place, limits)
        past = self.of.slots - self._queries
        if self._mask is None:
            seen = seen & (own.columns <= torch.arange(own.first, own.stop, device=device)[:, None])
        else:
            seen = seen & shown(whole(self._mask)[:, :, own.first - past : own.stop - past]).to(device)[..., own.columns]
        return own.columns, seen | (own.number[:, None, :, None] < 0)

    def _on(self, first: int, columns: NDArray[np.int64], limits: SlidingWindow, device: torch.device) -> _Block:
        # A padding query sees nothing; it is shown a token, because a softmax over nothing is NaN.
        columns = columns if len(columns) else np.array([first])
        stop, number, place = min(first + limits.window, self.of.slots), self.of.number, self.of.place
        of_slots = columns, number[:, first:stop], place[:, first:stop], number[:, columns], place[:, columns]
        return _Block(first, stop, *(upload(torch.as_tensor(np.ascontiguousarray(x)), device) for x in of_slots))


def within(number: Tensor, place: Tensor, key_number: Tensor, key_place: Tensor, limits: SlidingWindow) -> Tensor:
    """Whether a key is of a query's document and within its limits, (batch, 1, queries, keys); all are (batch, n)."""
    number, place = number[:, None, :, None], place[:, None, :, None]
    key_number, key_place = key_number[:, None, None], key_place[:, None, None]
    near = (key_place > place - limits.window) | (key_place < limits.sink)
    return (number == key_number) & (number >= 0) & near


def _columns(of: Documents, queries: int, limits: SlidingWindow) -> list[NDArray[np.int64]]:
    """For each block of queries the slots that may be seen where nothing but padding and later tokens is hidden."""
    past, real = of.slots - queries, of.number >= 0
    count, sinks = of.count, real & (of.place < limits.sink)
    found = []
    for first in range(past, of.slots, limits.window):
        near = real & (count > count[:, first : first + 1] - limits.window)
        seen = (sinks | near)[:, : min(first + limits.window, of.slots)]
        found.append(np.nonzero(seen.any(0))[0])
    return found
