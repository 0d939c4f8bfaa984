"""Map building: glimpses of a hidden map, each with its place, and then questions about cells.

`MapBuilding.paper` is the original of arXiv 2605.27686: any cell is asked for, also one that no glimpse has shown, so that the
best accuracy is well below 1. Otherwise only cells that were seen are, after a delay that a window of attention cannot bridge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor
from torch.nn.functional import one_hot

from tessera.lab.tasks.associative_recall import IGNORED

#: Cells along a side of a glimpse.
GLIMPSE = 2


@dataclass(frozen=True)
class MapBuilding:
    """The task.

    Attributes:
        size: cells along a side of the map, each 0 or 1.
        glimpses: number of glimpses, of 2x2 cells at random places, a token each.
        ask: whether "seen" cells are asked for, or "any" as in the original.
        delay: blank tokens between the glimpses and the first question.
        queries: cells that are asked for, a token each.
    """

    size: int = 8
    glimpses: int = 16
    ask: Literal["seen", "any"] = "seen"
    delay: int = 0
    queries: int = 4

    def __post_init__(self) -> None:
        if self.size < GLIMPSE or self.glimpses < 1 or self.queries < 1 or self.delay < 0:
            raise ValueError(
                f"size must be at least {GLIMPSE}, glimpses and queries 1, delay 0; "
                f"got {self.size}, {self.glimpses}, {self.queries}, {self.delay}"
            )
        if self.ask not in ("seen", "any"):
            raise ValueError(f"ask must be 'seen' or 'any', got {self.ask!r}")

    @classmethod
    def paper(cls, glimpses: int = 16, **changes: Any) -> MapBuilding:
        """Return the original task: one question, about any cell, after so many glimpses."""
        return cls(**{"glimpses": glimpses, "ask": "any", "queries": 1, **changes})

    frame = 1
    """Tokens of a frame."""
    classes = 2
    """Number of possible answers."""
    place = (3, 5)
    """Range [first, end) of the features that are a token's place, from -1 to 1; a blank token is in the middle."""

    @property
    def features(self) -> int:
        """Number of features: the token's kind, row and column as x and y and one-hot, and the cells of a glimpse as -1, 1."""
        return 3 + 2 + 2 * self.size + GLIMPSE**2

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.glimpses + self.delay + self.queries

    @property
    def seen(self) -> float:
        """Probability that a cell has been seen."""
        places = self.size - GLIMPSE + 1
        cells = torch.arange(self.size)
        # Number of places of a glimpse, along one side, that show the cell.
        along = torch.minimum(cells, torch.tensor(places - 1)) - (cells - GLIMPSE + 1).clamp(min=0) + 1
        shown = (along[:, None] * along).double() / places**2
        return float((1 - (1 - shown) ** self.glimpses).mean())

    @property
    def ceiling(self) -> float:
        """Accuracy of the best answer, which is a guess for a cell that no glimpse has shown."""
        return 1.0 if self.ask == "seen" else self.seen + (1 - self.seen) * self.chance

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return 1 / self.classes

    @property
    def stateless(self) -> float:
        """Accuracy of the best answer from the question alone."""
        return self.chance

    def sample(self, batch: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw sequences: tokens, (batch, length, features), and targets, (batch, length) int64, at the questions."""
        world = torch.randint(2, (batch, self.size, self.size), generator=generator)
        corner = torch.randint(self.size - GLIMPSE + 1, (batch, self.glimpses, 2), generator=generator)
        within = torch.cartesian_prod(torch.arange(GLIMPSE), torch.arange(GLIMPSE))
        cells = corner[:, :, None] + within
        cells = cells[..., 0] * self.size + cells[..., 1]
        shown = world.flatten(1).gather(1, cells.flatten(1)).view_as(cells)
        if self.ask == "seen":
            may = torch.zeros(batch, self.size**2).scatter_(1, cells.flatten(1), 1.0)
        else:
            may = torch.ones(batch, self.size**2)
        asked = may.multinomial(self.queries, replacement=True, generator=generator)
        tokens = torch.zeros(batch, self.length, self.features)
        first = self.length - self.queries
        tokens[:, : self.glimpses, 0] = 1
        tokens[:, self.glimpses : first, 1] = 1
        tokens[:, first:, 2] = 1
        # The middle of a glimpse is between cells.
        self._place(tokens[:, : self.glimpses], corner, (GLIMPSE - 1) / 2)
        self._place(tokens[:, first:], torch.stack((asked // self.size, asked % self.size), dim=-1), 0.0)
        tokens[:, : self.glimpses, -(GLIMPSE**2) :] = 2.0 * shown - 1
        targets = torch.full((batch, self.length), IGNORED)
        targets[:, first:] = world.flatten(1).gather(1, asked)
        return tokens, targets

    def _place(self, tokens: Tensor, cells: Tensor, offset: float) -> None:
        """Write rows and columns, (batch, n, 2), into tokens."""
        at = 2 * (cells.flip(-1) + offset) / (self.size - 1) - 1
        words = one_hot(cells, self.size).float().flatten(2)
        tokens[..., 3 : 5 + 2 * self.size] = torch.cat((at, words), dim=-1)
