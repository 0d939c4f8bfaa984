"""Reading a call's mask: which of its tokens are padding, where documents begin, and whether it hides anything else.

A mask that was made from a padding mask is evaluated on the host, from the padding mask; any other is evaluated on its device,
and the results come in one transfer. Both give the same answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.cache_layers.padding_mask import READ, PaddingMask, by_padding
from tessera.devices import upload
from tessera.finite import FiniteCheck
from tessera.readback import HostCopy

BIASED = "this attention mask adds a bias to the scores; only masks that hide are supported"


@dataclass(frozen=True)
class Rule:
    """The visibility of tokens in a layer without a mask.

    Attributes:
        sliding: this many newest tokens of their row, themselves included; None: all.
        by_document: only those of their own document.
        memory: a memory has absorbed what is this many tokens behind a query, but for so many first ones; None: there is none.
    """

    sliding: int | None = None
    by_document: bool = False
    memory: tuple[int, int] | None = None


@dataclass(frozen=True)
class NewTokens:
    """The new tokens of a call according to its mask, for each row.

    Attributes:
        real: for each row, one byte for each token: 1 for a token, 0 for padding.
        begins: for each row, the numbers of the tokens at which a document begins.
        plain: for each row of the batch, whether its real tokens see what the layer's rule shows them of the tokens that are
            known, and nothing else.
        strange: likewise, whether one sees a slot that is none of its row's tokens, or of another document where those count.
        absorbed: likewise, whether something is hidden from one that a memory has absorbed.
    """

    real: list[bytes]
    begins: list[list[int]]
    plain: list[bool]
    strange: list[bool]
    absorbed: list[bool]


def read_mask(mask: Tensor, known: NDArray[np.bool_], rule: Rule, finite: FiniteCheck | None) -> NewTokens | None:
    """Read the mask of a call, and what else the device has to say, in one look.

    Args:
        mask: attention mask of the call, (batch or 1, heads or 1, queries, slots).
        known: (batch, columns before the call's) bool, which slots hold tokens that the rows have.
        rule: the layer's rule.
        finite: told what it waits to hear; None: nothing.

    Returns:
        None if it says no more than the rule, and every row has all slots.

    Raises:
        ValueError: for an additive mask that does more than hide; see also `FiniteCheck.read`.
    """
    if by_padding(mask) and mask.window == rule.sliding:
        if finite is not None:
            finite.read(*([] if mask.padding is None else [mask.padding]))
        shown = mask.real_slots()
        if known.all() and (shown is None or shown.all()):
            return None  # as for most tokens that are decoded
        said = _of_padding(shown, known, mask.shape[-2], rule)
    else:
        said = _looked_at(mask, known, rule, finite)
    # The first token of all begins a document anyway.
    anew = rule.by_document and any(begins and (known.shape[1] or begins != [0]) for begins in said.begins)
    return None if known.all() and all(said.plain) and all(map(all, said.real)) and not anew else said


def _looked_at(mask: Tensor, known: NDArray[np.bool_], rule: Rule, finite: FiniteCheck | None) -> NewTokens:
    read: HostCopy | None = getattr(mask, READ, None)
    if read is not None:
        mask = torch.as_tensor(read.get())
    n, slots = mask.shape[-2:]
    past, device, batch = slots - n, mask.device, known.shape[0]
    biased = torch.zeros((), dtype=torch.bool, device=device)
    if mask.is_floating_point():
        biased = ~((mask == 0) | (mask <= torch.finfo(mask.dtype).min / 2)).all()
    seen = shown(mask)
    heads = seen.any(1)
    real = heads[..., past:].any(-2)
    earlier = torch.ones((n, slots), dtype=torch.bool, device=device).tril(past - 1)
    begins = real & ~(heads & earlier).any(-1)
    asks = real.expand(batch, -1)[:, :, None]  # (batch, queries, 1)
    held = torch.cat((upload(torch.from_numpy(known), device), real.expand(batch, -1)), 1)
    own = held[:, None]
    if rule.by_document:
        document = torch.nn.functional.pad(begins.cumsum(1), (past, 0)).expand(batch, -1)
        own = own & (document[:, None] == document[:, past:, None])
    column = torch.arange(slots, device=device)
    wanted = own & (column <= column[past:, None])
    count = held.cumsum(1)
    if rule.sliding is not None:
        wanted &= count[:, None] > count[:, past:, None] - rule.sliding
    plain = ((seen == wanted[:, None]) | ~asks[:, None]).flatten(1).all(1)
    strange = (seen & ~own[:, None] & asks[:, None]).flatten(1).any(1)
    absorbed = torch.zeros_like(plain)
    if rule.memory is not None:
        window, sink = rule.memory
        first = torch.nn.functional.pad(begins, (past, 0)).expand(batch, -1) if rule.by_document else torch.zeros_like(held)
        place = count - 1 - torch.where(first, count - 1, 0).cummax(1).values
        old = own & asks & (place[:, None] <= place[:, past:, None] - window) & (place[:, None] >= sink)
        absorbed = (old[:, None] & ~seen).flatten(1).any(1)
    found = torch.cat((real.flatten(), begins.flatten(), plain, strange, absorbed, biased[None]))
    copy = None if read is not None else HostCopy(found)
    if finite is not None:
        finite.read(*([] if copy is None else [copy]))
    said = found.numpy() if copy is None else copy.get()
    if said[-1]:
        raise ValueError(BIASED)
    rows, size = real.shape
    return NewTokens(
        [row.tobytes() for row in said[: rows * size].reshape(rows, size)],
        [row.nonzero()[0].tolist() for row in said[rows * size : 2 * rows * size].reshape(rows, size)],
        *(part.tolist() for part in said[2 * rows * size : -1].reshape(3, batch)),
    )


def shown(mask: Tensor) -> Tensor:
    """The mask as bool, True where a query sees a slot; that it does no more than hide must be known."""
    mask = whole(mask)
    return mask == 0 if mask.is_floating_point() else mask.bool()


def whole(mask: Tensor) -> Tensor:
    """The mask itself, where it is not made yet."""
    return mask.whole if isinstance(mask, PaddingMask) else mask


def _of_padding(shown: NDArray[np.bool_] | None, known: NDArray[np.bool_], n: int, rule: Rule) -> NewTokens:
    """As `_looked_at` of the mask that is made of padding and the rule's window: a query sees slots that are no padding.

    shown: (batch, slots), False for padding; None: there is none.
    """
    batch, past = known.shape
    if shown is None:
        shown = np.ones((batch, past + n), dtype=np.bool_)
    real, before, window = shown[:, past:], shown[:, :past], rule.sliding
    asks = _any(real)
    first = past + real.argmax(1)  # slot of the first real query
    begins: list[list[int]] = [[] for _ in range(batch)]
    if window is None:
        alone = asks & ~_any(before)
        for row in alone.nonzero()[0]:
            begins[row] = [int(first[row]) - past]
    else:
        seen = _sums(shown)
        slot = np.arange(past, past + n)
        none = real & (seen[:, past:-1] == seen[:, np.maximum(slot - window + 1, 0)])
        begins = [row.nonzero()[0].tolist() for row in none]
        alone = np.zeros(batch, dtype=np.bool_)
    own = known & ~alone[:, None] if rule.by_document else known
    strange = absorbed = hidden = np.zeros(batch, dtype=np.bool_)
    # New tokens are seen as they are. Of those before, the first query sees at least what later ones see.
    unlike = (before != own) & asks[:, None]
    if unlike.any():
        seen_first = shown_first = unlike
        if window is not None:
            count = _sums(np.concatenate((own, real), 1))
            seen_first = unlike & (np.arange(past) > first[:, None] - window)
            shown_first = unlike & (count[:, 1 : past + 1] > np.take_along_axis(count, first[:, None] + 1, 1) - window)
        strange, hidden = _any(seen_first & before), _any(shown_first & own)
    plain = ~asks | ~(strange | hidden)
    if window is not None:
        count = _sums(np.concatenate((own, real), 1))
        newest, slot = count[:, past + 1 :], np.arange(past, past + n)
        inside = newest - count[:, np.maximum(slot + 1 - window, 0)]
        plain &= ((inside == np.minimum(newest, window)) | ~real).all(1)
    if rule.memory is not None and (hidden & asks).any():
        place = own.cumsum(1) - 1
        last = own.sum(1) + real.sum(1) - 1
        old = own & (place <= (last - rule.memory[0])[:, None]) & (place >= rule.memory[1])
        absorbed = _any(old & ~before & asks[:, None])
    return NewTokens([row.tobytes() for row in real], begins, plain.tolist(), strange.tolist(), absorbed.tolist())


def _sums(x: NDArray[np.bool_]) -> NDArray[np.int32]:
    """(rows, n + 1), how many are true before each and in all."""
    out = np.zeros((x.shape[0], x.shape[1] + 1), dtype=np.int32)
    np.cumsum(x, 1, out=out[:, 1:])
    return out


def _any(x: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return np.asarray(x.any(1))
