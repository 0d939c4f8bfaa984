"""Coordinate binding: values are written at places in a cube, then places nearby are asked for.

`Binding.paper` is the original of arXiv 2605.27686: one question, right after the writes. Otherwise there are several
questions, after a delay that a window of attention cannot bridge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import one_hot

from tessera.lab.tasks.associative_recall import IGNORED


@dataclass(frozen=True)
class Binding:
    """The task.

    Attributes:
        pairs: number of pairs of a place, uniform in [-1, 1]³, and a value.
        noise: standard deviation, along each axis, of a question's distance from its place.
        values: number of possible values.
        delay: number of blank tokens between the writes and the first question.
        queries: number of places that are asked for.
    """

    pairs: int = 20
    noise: float = 0.05
    values: int = 32
    delay: int = 0
    queries: int = 8

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.queries < 1 or self.values < 2 or self.delay < 0 or not self.noise >= 0:
            raise ValueError(
                "pairs and queries must be at least 1, values 2, delay and noise 0; "
                f"got {self.pairs}, {self.queries}, {self.values}, {self.delay}, {self.noise}"
            )

    @classmethod
    def paper(cls, pairs: int = 20, noise: float = 0.05, **changes: Any) -> Binding:
        """Return the original task, with one question."""
        return cls(**{"pairs": pairs, "noise": noise, "queries": 1, **changes})

    frame = 1
    """Tokens of a frame."""
    place = (3, 6)
    """Range [first, end) of the features that are a token's place, in [-1, 1] plus noise; a blank token is in the middle."""
    ceiling = 1.0
    """Accuracy of the best answer; the value of the nearest place counts as right, whichever place the question came from."""

    @property
    def features(self) -> int:
        """Number of features of a token: its kind, a place, a value as a one-hot vector."""
        return 3 + 3 + self.values

    @property
    def classes(self) -> int:
        """Number of possible answers."""
        return self.values

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.pairs + self.delay + self.queries

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return 1 / self.values

    @property
    def stateless(self) -> float:
        """Accuracy of the best answer from the question alone."""
        return self.chance

    def sample(self, batch: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw sequences: tokens, (batch, length, features), and targets, (batch, length) int64, at the questions."""
        places = 2 * torch.rand((batch, self.pairs, 3), generator=generator) - 1
        value = torch.randint(self.values, (batch, self.pairs), generator=generator)
        origin = torch.randint(self.pairs, (batch, self.queries), generator=generator)
        asked = places.gather(1, origin[..., None].expand(-1, -1, 3))
        asked = asked + self.noise * torch.randn(asked.shape, generator=generator)
        nearest = torch.cdist(asked, places, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)
        tokens = torch.zeros(batch, self.length, self.features)
        first = self.length - self.queries
        for kind, part in enumerate((slice(0, self.pairs), slice(self.pairs, first), slice(first, None))):
            tokens[:, part, kind] = 1
        tokens[:, : self.pairs, 3:6] = places
        tokens[:, : self.pairs, 6:] = one_hot(value, self.values).float()
        tokens[:, first:, 3:6] = asked
        targets = torch.full((batch, self.length), IGNORED)
        targets[:, first:] = value.gather(1, nearest)
        return tokens, targets
