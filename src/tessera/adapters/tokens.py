"""The tokens of a call of a causal model: which are padding, and where documents within a row begin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.masking_utils import find_packed_sequence_indices

from tessera.cache_layers.new_tokens import shown
from tessera.cache_layers.padding_mask import READ, PaddingMask, by_padding
from tessera.readback import HostCopy


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of one call.

    Attributes:
        shape: (rows, tokens); None: unknown, in which case the model itself will refuse the call.
        real: (rows, tokens) bool on the CPU, False for padding; None: there is none.
        begins: (rows, tokens) bool on the CPU, True where a document begins behind another; None: every row is one document.
        mask: the mask of the call, as the layers are to be given it, with its copy on the host; None: as it is.
    """

    shape: tuple[int, int] | None = None
    real: Tensor | None = None
    begins: Tensor | None = None
    mask: Any = None


def read_tokens(
    given: Mapping[str, Any], cached: bool, earlier: Callable[[], Tensor | None], past: int, window: int | None
) -> Tokens:
    """Read the arguments of a call.

    Args:
        given: arguments of the model's decoder by name.
        cached: whether the call has a cache, or the model makes one.
        earlier: returns (rows, past) bool on the CPU, which tokens of earlier calls with the same cache were real; None: all.
        past: tokens of a row in the earlier calls.
        window: window of the model's sliding layers, in tokens, or None.

    Raises:
        ValueError: for masks and positions that a sequential memory cannot follow, with the cause and the remedy.
    """
    embeds, ids = given.get("inputs_embeds"), given.get("input_ids")
    source = ids if embeds is None else embeds
    if not isinstance(source, Tensor) or source.ndim < 2:
        return Tokens()
    shape = source.shape[0], source.shape[1]
    mask = given.get("attention_mask")
    by_kind = mask if isinstance(mask, dict) else {}
    if isinstance(mask, dict):
        # The decoder's caller made a mask for each type of layer; full layers see all that sliding ones do.
        window = None if "full_attention" in mask else window
        mask = mask["full_attention"] if "full_attention" in mask else next(iter(mask.values()), None)
    # All that is to be read is noted first, so that one transfer brings it.
    finite = None if embeds is None else HostCopy(source.isfinite().all())
    unordered = _unordered(given, shape) if mask is None and cached else None
    flat = noted(mask) if isinstance(mask, Tensor) and mask.ndim == 2 else None
    square = Square(mask) if isinstance(mask, Tensor) and mask.ndim == 4 else None
    # Those of other kinds of layers are read by the layers.
    told = {name: square if each is mask else Square(each) for name, each in by_kind.items() if getattr(each, "ndim", 0) == 4}
    kept = earlier()
    if finite is not None and not finite.get():
        raise ValueError("inputs_embeds must be finite; a memory that has absorbed NaN or infinity never recovers")
    begins = None
    if mask is None:
        if kept is not None:
            raise ValueError(
                "earlier calls with this cache had padding, and this one has no attention mask: pass the mask of all tokens, "
                f"(batch, {past + shape[1]})"
            )
        real = None
    elif flat is not None:
        real = _read_padding(flat, shape, kept, past)
    elif square is not None:
        real, begins = _read_square(square, shape, kept, past, window)
    else:
        raise ValueError(
            "with a Tensor Memory the attention mask must be (batch, tokens), which says what is padding, or "
            f"(batch, 1, queries, tokens); got {tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}"
        )
    begins = _join(begins, _read_lengths(given, shape), _read_numbers(given, shape))
    if cached and begins is not None:
        raise ValueError(PACKED)
    if mask is None:
        if unordered is not None and unordered.get():
            raise ValueError(PACKED)
        begins = begins if cached else _join(begins, _read_positions(given, shape))
    if by_kind:
        return Tokens(shape, real, begins, {**by_kind, **{name: each.told for name, each in told.items() if each is not None}})
    return Tokens(shape, real, begins, flat if square is None else square.told)


#: Why packed documents are refused where there is a cache, whose attention does not keep them apart.
PACKED = "documents packed into one row are kept apart without a cache only: pass use_cache=False, or a row for each document"


def noted(mask: Tensor) -> Tensor:
    """A copy of a (rows, slots) mask as bool, with a note that the host will want to read it."""
    # A copy in any case: whoever has read this one must not find the caller's next mask in it.
    own = mask.to(torch.bool, copy=True)
    setattr(own, READ, HostCopy(own))
    return own


def _read_padding(mask: Tensor, shape: tuple[int, int], kept: Tensor | None, past: int) -> Tensor | None:
    """Read a mask (batch, tokens so far): which of the new tokens are real; None: all."""
    rows, tokens = shape
    if mask.shape[0] != rows or mask.shape[1] < past + tokens:
        raise ValueError(
            f"the attention mask {tuple(mask.shape)} does not fit {tokens} tokens of {rows} rows"
            + (f" behind {past} of earlier calls: it must be ({rows}, {past + tokens})" if past else "")
        )
    read: HostCopy = getattr(mask, READ)
    told = torch.as_tensor(read.get())[:, : past + tokens]
    if not _same(told[:, :past], kept):
        raise ValueError(
            "the attention mask hides other tokens of earlier calls than it did then, and a memory cannot forget what it has "
            "read: pass the earlier mask with new columns behind it, or begin with a new cache"
        )
    real = told[:, past:]
    return None if bool(real.all()) else real


def _read_square(
    square: Square, shape: tuple[int, int], kept: Tensor | None, past: int, window: int | None
) -> tuple[Tensor | None, Tensor | None]:
    """Read a mask (batch or 1, heads or 1, queries, slots): which tokens are real and where documents begin."""
    rows, tokens = shape
    visible, mask = square.visible(), square.mask
    if mask.shape[0] not in (1, rows) or mask.shape[2] != tokens or not bool((visible == visible[:, :1]).all()):
        raise ValueError(
            f"the attention mask {tuple(mask.shape)} does not fit {tokens} tokens of {rows} rows, or differs between heads; "
            "pass one of (batch, tokens), which says what is padding"
        )
    visible = visible[:, 0].expand(rows, -1, -1)
    # With a cache of sliding layers only, the mask has no columns for tokens before their window.
    offset = 0 if window is None else max(0, past + tokens - visible.shape[2])
    first = past - offset
    if first < 0 or visible.shape[2] < first + tokens:
        raise ValueError(f"the attention mask {tuple(mask.shape)} does not fit {tokens} tokens behind {past} of earlier calls")
    real = visible[:, :, first : first + tokens].diagonal(0, 1, 2)
    before = torch.ones(rows, past, dtype=torch.bool) if kept is None else kept
    known = torch.cat((before[:, offset:], real), dim=1)
    query = torch.arange(tokens)
    # The real token before each one tells whether it belongs to the same document.
    newest = torch.where(real, query, -1).cummax(dim=1).values
    previous = pad(newest[:, :-1], (1, 0), value=-1)
    sees = visible.gather(2, (first + previous.clamp(min=0))[..., None])[..., 0]
    begins = real & (previous >= 0) & ~sees
    if window is not None:
        # Tokens outside the window may still belong to the same document.
        begins &= query - previous < window
    document = pad(begins.cumsum(1), (first, 0))
    slots = torch.arange(known.shape[1])
    causal = slots <= first + query[:, None]
    wanted = causal & known[:, None] & (document[:, first:, None] == document[:, None])
    near = wanted if window is None else wanted & (slots > first + query[:, None] - window)
    later = visible[:, :, : known.shape[1]] & ~causal
    if bool((later | visible[:, :, known.shape[1] :].any(2, keepdim=True))[real].any()):
        raise ValueError(
            "this attention mask lets tokens see later ones, as token_type_ids let those of an image, but a Tensor Memory "
            "reads one token after the other: leave token_type_ids out, or call tessera.detach(model)"
        )
    if not any(torch.equal(visible[:, :, : known.shape[1]][real], each[real]) for each in (wanted, near)):
        raise ValueError(
            "this attention mask hides more than padding and other documents, which a Tensor Memory cannot follow: pass one of "
            "(batch, tokens), which says what is padding"
        )
    return None if bool(real.all()) else real, begins if bool(begins.any()) else None


class Square:
    """A mask of (batch or 1, heads or 1, queries, slots) that the host will want to read."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self._seen = None if by_padding(mask) else HostCopy(shown(mask))
        #: The same mask for the layers of the call, which read it too; the caller's own may be another by the next call.
        self.told = mask
        if self._seen is not None and not isinstance(mask, PaddingMask):
            self.told = mask.view_as(mask)
            setattr(self.told, READ, self._seen)
        biased = mask.is_floating_point() and ~((mask == 0) | (mask <= torch.finfo(mask.dtype).min / 2)).all()
        self._biased = HostCopy(biased) if isinstance(biased, Tensor) else None

    def visible(self) -> Tensor:
        """Return where a query sees a slot, on the CPU.

        Raises:
            ValueError: if it adds a bias to the scores.
        """
        if self._biased is not None and self._biased.get():
            raise ValueError(
                "this attention mask adds a bias to the scores, which a Tensor Memory cannot follow: pass one of "
                "(batch, tokens), which says what is padding"
            )
        if self._seen is None:
            assert isinstance(self.mask, PaddingMask)
            return self.mask.on_cpu()
        return torch.as_tensor(self._seen.get())


def _positions(given: Mapping[str, Any], shape: tuple[int, int]) -> Tensor | None:
    """Positions of the tokens, (rows or 1, tokens), as far as they are of the text; None: there are none."""
    positions = given.get("position_ids")
    if not isinstance(positions, Tensor):
        return None
    if positions.ndim == 3 and len(positions) == 4:
        # In models with positions along several axes, the first axis is that of the text.
        positions = positions[0]
    return positions.detach() if positions.ndim == 2 and positions.shape[1] == shape[1] else None


def _unordered(given: Mapping[str, Any], shape: tuple[int, int]) -> HostCopy | None:
    """Whether a position is not behind the one before it; None: there is none before any."""
    positions = _positions(given, shape) if shape[1] > 1 else None
    return None if positions is None else HostCopy((positions.diff(dim=1) < 1).any())


def _read_positions(given: Mapping[str, Any], shape: tuple[int, int]) -> Tensor | None:
    """Find where documents begin from positions, as attention does where there is neither a mask nor a cache."""
    positions = _positions(given, shape)
    documents = None if positions is None else find_packed_sequence_indices(positions.cpu().expand(shape))
    return None if documents is None else _changes(documents)


def _read_lengths(given: Mapping[str, Any], shape: tuple[int, int]) -> Tensor | None:
    """Find where documents begin from cumulative lengths, as given to kernels for packed documents."""
    sums = given.get("cu_seq_lens_q")
    if sums is None:
        return None
    ends = torch.as_tensor(sums).detach().cpu().flatten().long()
    other = given.get("cu_seq_lens_k")
    alike = other is None or torch.equal(torch.as_tensor(other).detach().cpu().flatten().long(), ends)
    rows, tokens = shape
    whole = len(ends) > 1 and int(ends[0]) == 0 and int(ends[-1]) == tokens and bool((ends.diff() >= 0).all())
    if rows != 1 or not alike or not whole:
        raise ValueError(
            f"cu_seq_lens_q must divide the {tokens} tokens of one row into documents, and cu_seq_lens_k be the same; "
            f"got {ends.tolist()} for {rows} rows"
        )
    begins = torch.zeros(1, tokens + 1, dtype=torch.bool)
    begins[0, ends[1:-1]] = True
    return begins[:, :-1]


def _read_numbers(given: Mapping[str, Any], shape: tuple[int, int]) -> Tensor | None:
    """Find where documents begin from the number of each token's document."""
    numbers = given.get("seq_idx")
    if numbers is None:
        return None
    if tuple(numbers.shape) not in (shape, (1, shape[1])):
        raise ValueError(f"seq_idx must be {shape}, the number of each token's document; got {tuple(numbers.shape)}")
    return _changes(numbers.detach().cpu().expand(shape))


def _changes(documents: Tensor) -> Tensor:
    return pad(documents.diff(dim=1) != 0, (1, 0))


def _join(*found: Tensor | None) -> Tensor | None:
    """Join several tensors of beginnings; None: there are none."""
    joined = torch.stack([each for each in found if each is not None]).any(0) if any(x is not None for x in found) else None
    return joined if joined is not None and bool(joined.any()) else None


def _same(told: Tensor, kept: Tensor | None) -> bool:
    return bool(told.all()) if kept is None else torch.equal(told, kept)
