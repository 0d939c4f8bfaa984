"""Reading the boolean masks that the model makes: where padding ends, and whether a lane needs its mask at all."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor


class MaskMemo:
    """Answers about masks, kept while the mask lives: all layers of a call are given the same one."""

    def __init__(self) -> None:
        self._known: list[tuple[weakref.ref[Tensor], object, object]] = []

    def get(self, mask: Tensor, question: object) -> object | None:
        """The answer that was put, or None."""
        self._known = [entry for entry in self._known if entry[0]() is not None][-64:]
        return next((answer for ref, asked, answer in self._known if ref() is mask and asked == question), None)

    def put(self, mask: Tensor, question: object, answer: object) -> None:
        """Remember an answer."""
        self._known.append((weakref.ref(mask), question, answer))


def boolean(mask: Tensor) -> Tensor:
    """The mask as (batch or 1, heads or 1, queries, slots) bool, True where a query sees a slot.

    Raises:
        ValueError: for an additive mask that does more than hide.
    """
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        return mask.bool()
    seen = mask == 0
    if not (seen | (mask <= torch.finfo(mask.dtype).min / 2)).all():
        raise ValueError("this attention mask adds a bias to the scores; only masks that hide are supported")
    return seen


def leading_pads(mask: Tensor, memo: MaskMemo) -> list[int]:
    """For each row of the mask how many of the call's slots come before its first real token (which sees itself)."""
    known = memo.get(mask, "pads")
    if known is None:
        queries = mask.shape[-2]
        itself = boolean(mask)[:, 0].diagonal(mask.shape[-1] - queries, -2, -1)
        known = (itself.long().cumsum(-1) == 0).sum(-1).tolist()
        memo.put(mask, "pads", known)
    assert isinstance(known, list)
    return known


class LaneMask:
    """A mask as one lane sees it.

    Args:
        mask: (batch or 1, heads or 1, queries, slots); its last column is the newest slot.
        rows: the lane's batch rows.
        begin: queries of padding before the lane's first.
        shift: column of the lane's place 0; may be negative.
    """

    def __init__(self, mask: Tensor, rows: list[int], begin: int, shift: int) -> None:
        mask = boolean(mask)
        if mask.shape[0] > 1 and rows != list(range(mask.shape[0])):
            mask = mask[torch.tensor(rows, device=mask.device)]
        self.mask = mask[:, :, begin:]
        self.shift = shift

    def columns(self, start: int, tokens: int) -> Tensor:
        """The columns of the lane's places [start, start + tokens); places before the mask begins are hidden."""
        a, b = start + self.shift, start + self.shift + tokens
        part = self.mask[..., max(a, 0) : max(b, 0)]
        return part if a >= 0 else torch.nn.functional.pad(part, (min(-a, tokens), 0), value=False)

    def plain(self, first: int, sliding: int | None) -> bool:
        """Whether it says no more than: no later token, and none outside the window of `sliding` tokens."""
        queries, slots = self.mask.shape[-2:]
        low = max(self.shift, 0)
        query = torch.arange(first, first + queries, device=self.mask.device)[:, None]
        place = torch.arange(low, slots, device=self.mask.device) - self.shift
        rule = place <= query
        if sliding is not None:
            rule &= place > query - sliding
        return bool((self.mask[..., low:] == rule).all())


def lane_mask(
    mask: Tensor | None, memo: MaskMemo, rows: list[int], begin: int, shift: int, first: int, sliding: int | None
) -> LaneMask | None:
    """The lane's mask, or None where positions alone say the same."""
    if mask is None:
        return None
    question = (tuple(rows), begin, shift, first, sliding)
    plain = memo.get(mask, question)
    if plain is True:
        return None
    view = LaneMask(mask, rows, begin, shift)
    if plain is None:
        plain = view.plain(first, sliding)
        memo.put(mask, question, plain)
    return None if plain else view
