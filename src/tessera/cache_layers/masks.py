"""The meaning of attention masks: which new tokens are padding, where documents begin, and which masks are supported.

A mask is (batch or 1, heads or 1, queries, slots), True where a query sees a slot; its last columns are the slots of the call's
own tokens, one for each query. None stands for plain causality. What a cache has to know of a call's new tokens is read in
`tessera.cache_layers.new_tokens`.

- A new token is *padding* if no query of its call sees it, itself included. Padding is never stored, counted or written.
- A document *begins* at a token that sees no earlier slot, as rows of packed documents have it.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tessera.cache_layers.new_tokens import BIASED
from tessera.devices import upload


class MaskMemo:
    """Memoised properties of the masks of one step, whose layers are all given the same few.

    Masks are compared by identity, so nothing is kept beyond the step: the next one may reuse the same buffer.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Clear the memo at the beginning of a step."""
        self._known: list[tuple[weakref.ref[Tensor], Hashable, Any]] = []
        self._indices: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def index(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """Return row numbers as a tensor on a device, copied there once a step."""
        key = tuple(rows), device
        if key not in self._indices:
            self._indices[key] = upload(torch.tensor(rows, dtype=torch.long), device)
        return self._indices[key]

    def ask(self, mask: Tensor, question: Hashable, answer: Callable[[], Any]) -> Any:
        """Return the result of `answer`, computed once for each mask and question."""
        for known, asked, said in self._known:
            if known() is mask and asked == question:
                return said
        said = answer()
        self._known.append((weakref.ref(mask), question, said))
        return said

    def __getstate__(self) -> dict[str, Any]:
        return {"_known": [], "_indices": {}}  # weak references cannot be pickled, and no copy needs them

    def __deepcopy__(self, memo: object) -> MaskMemo:
        return MaskMemo()


def boolean(mask: Tensor) -> Tensor:
    """Convert the mask to (batch or 1, heads or 1, queries, slots) bool, True where a query sees a slot.

    Raises:
        ValueError: for an additive mask that does more than hide.
    """
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        return mask.bool()
    seen = mask == 0
    if not (seen | (mask <= torch.finfo(mask.dtype).min / 2)).all():
        raise ValueError(BIASED)
    return seen


@dataclass(frozen=True)
class Runs:
    """Slots of a row, ascending, as runs of (first slot, count).

    Rows without padding between their tokens have one run, so this stays small however long they grow.
    """

    runs: tuple[tuple[int, int], ...] = ()

    @property
    def count(self) -> int:
        """Number of slots."""
        return sum(size for _, size in self.runs)

    @staticmethod
    def marked(real: bytes) -> Runs:
        """The slots that `real` marks."""
        runs = [(match.start(), len(match.group())) for match in re.finditer(b"\x01+", real)]
        return Runs(tuple(runs))

    def joined(self, later: Runs, by: int) -> Runs:
        """Append `later`, moved by so many slots."""
        runs = [*self.runs]
        for first, size in later.runs:
            if runs and sum(runs[-1]) == first + by:
                runs[-1] = (runs[-1][0], runs[-1][1] + size)
            else:
                runs.append((first + by, size))
        return Runs(tuple(runs))

    def with_next(self, slot: int) -> Runs:
        """Append one slot, behind all others."""
        if self.runs and sum(self.runs[-1]) == slot:
            return Runs((*self.runs[:-1], (self.runs[-1][0], self.runs[-1][1] + 1)))
        return Runs((*self.runs, (slot, 1)))

    def before(self, slot: int) -> int:
        """Count the slots before `slot`."""
        return sum(min(size, max(0, slot - first)) for first, size in self.runs)

    def cut(self, begin: int, end: int) -> Runs:
        """The slots of number `begin` to `end` - 1."""
        kept, number = [], 0
        for first, size in self.runs:
            a, b = max(begin - number, 0), min(end - number, size)
            if a < b:
                kept.append((first + a, b - a))
            number += size
        return Runs(tuple(kept))

    def between(self, begin: int, end: int) -> Runs:
        """Return the slots in [begin, end) that are missing from these."""
        gaps, at = [], begin
        for first, size in (*self.runs, (end, 0)):
            if at < min(first, end):
                gaps.append((at, min(first, end) - at))
            at = max(at, first + size)
        return Runs(tuple(gaps))

    def index(self, device: torch.device) -> Tensor:
        """The slots themselves, (n,) int64."""
        return torch.cat([torch.arange(first, first + size, device=device) for first, size in self.runs])

    def of(self, tensor: Tensor, first: int, dim: int) -> Tensor:
        """Select these slots from a tensor whose `dim` counts slots from `first` on; none may be before `first`."""
        if len(self.runs) == 1 and self.runs[0] == (first, tensor.shape[dim]):
            return tensor  # the whole tensor, which is usual in a step
        parts = [tensor.narrow(dim, slot - first, size) for slot, size in self.runs]
        return parts[0] if len(parts) == 1 else torch.cat([tensor.narrow(dim, 0, 0), *parts], dim)


class GroupMask:
    """A call's mask restricted to the rows that share their tiers.

    Args:
        mask: attention mask of the call, boolean; its last column is the newest slot.
        index: (rows,) int64 on the mask's device; None: all rows of the batch.
        queries: which of the call's tokens the queries are.
        slots: slots of all tokens of these rows up to now, by place.
        seen: number of slots up to now.
    """

    def __init__(self, mask: Tensor, index: Tensor | None, queries: Runs, slots: Runs, seen: int) -> None:
        if mask.shape[0] > 1 and index is not None:
            mask = mask.index_select(0, index)
        self.first = seen - mask.shape[-1]
        self.mask = queries.of(mask, 0, -2)
        self.slots, self.seen = slots, seen

    def columns(self, start: int, tokens: int) -> Tensor:
        """The columns of the places [start, start + tokens); slots before the mask begins are hidden."""
        wanted = self.slots.cut(start, start + tokens)
        known = wanted.cut(wanted.before(self.first), wanted.count)
        found = known.of(self.mask, self.first, -1) if known.runs else self.mask[..., :0]
        return torch.nn.functional.pad(found, (wanted.count - known.count, 0), value=False)


def by_lengths(lengths: Tensor, mask: Tensor | None, batch: int, queries: int, slots: int) -> Tensor:
    """Make the mask of a row of packed documents from their lengths, as kernels for packed attention are given them.

    Args:
        lengths: (documents + 1,) where documents begin, and at last the end, as in the keyword argument `cu_seq_lens_q`.
        mask: attention mask of the call, which counts too, or None.
        batch, queries, slots: sizes of the call.

    Raises:
        ValueError: for several rows, or another number of tokens.
    """
    if batch != 1 or queries != slots or lengths.ndim != 1 or int(lengths[-1]) != queries:
        raise ValueError(
            f"cu_seq_lens_q must end at the tokens of one row without a cache: got {lengths.tolist()} for {batch} rows of "
            f"{queries} tokens and {slots} slots"
        )
    place = torch.arange(queries, device=lengths.device)
    number = torch.searchsorted(lengths.contiguous(), place, right=True)
    packed = ((number[:, None] == number) & (place[:, None] >= place))[None, None]
    return packed if mask is None else packed & boolean(mask)
