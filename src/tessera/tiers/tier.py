"""The interface of a tier: it takes pairs, says what queries can read, and passes its oldest tokens on.

Exact tiers hold the first and the newest tokens, a quantised tier holds older ones, and what leaves the last tier is written
into a Tensor Cache or dropped. A tier knows neither its neighbours nor where padding is: `tessera.tiers.chain` connects them.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tessera.kernels import CompressedKV

if TYPE_CHECKING:
    from typing_extensions import Self  # of typing since Python 3.11

#: Number of tokens that are compressed, and dropped, together. Every codec's group divides it.
BLOCK = 64
#: Keys and values, each (rows, kv_heads, tokens, head_dim).
Pairs = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class KVSource:
    """Consecutive tokens that attention reads in one operation.

    Attributes:
        held: quantised pages, or keys and values (rows, kv_heads, tokens, head_dim).
        start: place of the first of them in the sequence.
        tokens: how many.
        window: a query sees only this many newest tokens of them, itself included; None: no such rule.
        top: number of tokens that a query reads at most, in the blocks with the highest estimated scores; None: all.
        unmasked: whether every query reads every key. There need not be one key for each token then, and no mask can hide any.
    """

    held: CompressedKV | Pairs
    start: int
    tokens: int
    window: int | None = None
    top: int | None = None
    unmasked: bool = False


class Tier(ABC):
    """Tokens of some sequences of equal length, in order.

    Attributes:
        keeps_tokens: whether tokens can be told apart, so that a mask can hide a token and a crop can remove it.
    """

    keeps_tokens = True

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Number of tokens of each sequence that the tier represents; the oldest are those that came first."""

    @property
    def ready(self) -> bool:
        """Whether the tier can take pairs now; until then they stay in the tier before it."""
        return True

    @abstractmethod
    def append(self, k: Tensor, v: Tensor, place: int) -> Pairs | None:
        """Add tokens that are newer than all held ones.

        Args:
            k, v: (rows, kv_heads, n, head_dim).
            place: place of the first of them in its sequence.

        Returns: tokens for which there is no room, which go on to the next tier at once; None: all were taken.
        """

    def excess(self, spare: int) -> int:
        """Number of oldest tokens, in whole blocks, that should go on to the next tier; `spare` more than usual may stay."""
        return 0

    def front(self, n: int) -> Pairs:
        """Keys and values of the `n` oldest tokens, decoded. Only for a tier whose `excess` is not always 0."""
        raise NotImplementedError

    def drop_front(self, n: int) -> None:
        """Remove the `n` oldest tokens. Only for a tier whose `excess` is not always 0."""
        raise NotImplementedError

    def crop_back(self, n: int) -> Pairs | None:
        """Remove the `n` newest tokens.

        Returns:
            tokens that the tier can no longer hold because they no longer fill a block, decoded; None: there are none.
        """
        raise NotImplementedError

    @abstractmethod
    def sources(self, start: int, window: int | None) -> list[KVSource]:
        """Return what queries can read.

        Args:
            start: place of the oldest token.
            window: a query sees only this many newest tokens; None: all.
        """

    @abstractmethod
    def buffers(self) -> list[Tensor]:
        """Every tensor that is held, for its bytes."""

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Keep the sequences with these indices, in memory that this tier owns. rows: (n,) int64."""

    @abstractmethod
    def to(self, device: torch.device | str) -> None:
        """Move to another device."""

    def copied(self) -> Self:
        """Return a copy whose rows can be selected without changing this one; both share memory until then."""
        return copy.copy(self)

    def tensors(self) -> dict[str, Tensor]:
        """Tensors that a cache's file should hold for a tier that was added to the grammar, by name."""
        raise NotImplementedError

    def restore(self, tensors: dict[str, Tensor], rows: int, kv_heads: int, head_dim: int) -> None:
        """Restore what `tensors` returned, from a file that may be damaged.

        Raises:
            ValueError: if the tensors do not fit this tier.
        """
        raise NotImplementedError


def whole_blocks(tokens: int) -> int:
    """Round a number of tokens down to whole blocks; 0 for a negative number."""
    return max(0, tokens) // BLOCK * BLOCK
