"""What a tier of the cache is: it takes pairs in, says what queries can read of it, and lets its oldest go on to the next tier.

Exact tiers hold the first and the newest tokens; a quantised tier holds what has aged; what leaves the last tier is dissolved
or dropped. A tier knows neither the tiers beside it nor where padding lies: `tessera.cache.chain` joins them.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tessera.cache.spec import BLOCK
from tessera.kernels import Pages

if TYPE_CHECKING:
    from typing_extensions import Self  # of typing since Python 3.11

#: Keys and values, each (rows, kv_heads, tokens, head_dim).
Pairs = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class KVSource:
    """Neighbouring tokens that attention reads in one go.

    Attributes:
        held: quantised pages, or keys and values (rows, kv_heads, tokens, head_dim).
        start: place of the first of them in the sequence.
        tokens: how many.
        window: a query sees only this many newest tokens of them, itself included; None: no such rule.
        top: a query reads at most so many of them, those that promise most; None: all.
        unmasked: every query reads every key. The keys need not be one a token then, and no mask can hide any.
    """

    held: Pages | Pairs
    start: int
    tokens: int
    window: int | None = None
    top: int | None = None
    unmasked: bool = False


class Tier(ABC):
    """Tokens of some sequences of equal length, in order.

    Attributes:
        keeps_tokens: whether each token can be told from the others, so that a mask can hide it and a crop take it back.
    """

    keeps_tokens = True

    @property
    @abstractmethod
    def tokens(self) -> int:
        """How many tokens of each sequence the tier stands for; the oldest are those that came first."""

    @property
    def ready(self) -> bool:
        """Whether the tier can take pairs in now. Until it can they stay in the tier before it."""
        return True

    @abstractmethod
    def append(self, k: Tensor, v: Tensor, place: int) -> Pairs | None:
        """Take in tokens that are newer than all that are held.

        Args:
            k, v: (rows, kv_heads, n, head_dim).
            place: of the first of them in its sequence.

        Returns:
            what the tier has no room for, which goes on to the next one at once; None: it has taken all.
        """

    def excess(self, spare: int) -> int:
        """How many of the oldest tokens, whole blocks, are to go on to the next tier; `spare` more than usual may stay."""
        return 0

    def front(self, n: int) -> Pairs:
        """Keys and values of the `n` oldest tokens, decoded. Only for a tier whose `excess` is not always 0."""
        raise NotImplementedError

    def drop_front(self, n: int) -> None:
        """Forget the `n` oldest tokens. Only for a tier whose `excess` is not always 0."""
        raise NotImplementedError

    def crop_back(self, n: int) -> Pairs | None:
        """Forget the `n` newest tokens.

        Returns:
            tokens that the tier can no longer hold because they fill no block now, decoded; None: there are none.
        """
        raise NotImplementedError

    @abstractmethod
    def sources(self, start: int, window: int | None) -> list[KVSource]:
        """What queries can read.

        Args:
            start: place of the oldest token.
            window: a query sees only this many newest tokens; None: all.
        """

    @abstractmethod
    def buffers(self) -> list[Tensor]:
        """Every tensor that is held, for its bytes."""

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Take sequences by index, into memory of this tier's own. rows: (n,) int64."""

    @abstractmethod
    def to(self, device: torch.device | str) -> None:
        """Move to another device."""

    def copied(self) -> Self:
        """The same tokens, of which rows may be taken here while there they stay; both share memory until then."""
        return copy.copy(self)

    def tensors(self) -> dict[str, Tensor]:
        """What the file of a cache is to hold of a tier of one's own, by name."""
        raise NotImplementedError

    def restore(self, tensors: dict[str, Tensor], rows: int, kv_heads: int, head_dim: int) -> None:
        """Hold what `tensors` gave, from a file that may be damaged.

        Raises:
            ValueError: if it is not that.
        """
        raise NotImplementedError


def whole_blocks(tokens: int) -> int:
    """As many tokens or fewer, whole blocks; 0 for a negative number."""
    return max(0, tokens) // BLOCK * BLOCK
