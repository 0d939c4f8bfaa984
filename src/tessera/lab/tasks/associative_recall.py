"""Associative recall over a gap: pairs of a key and a value, then filler, then questions about the values of keys.

After the multi-query associative recall of zoology (arXiv 2312.04927), whose usual generator asks most questions close to
the pairs, where a short window answers them. Here at least `gap` tokens of filler lie between the last pair and the first
question, so that what a window of at most gap / layers tokens sees cannot help.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

#: Target where nothing is asked, the default of `torch.nn.functional.cross_entropy`.
IGNORED = -100


@dataclass(frozen=True)
class Recall:
    """The task.

    Attributes:
        pairs: keys of a sequence, all different.
        gap: tokens of filler between the last pair and the first question.
        rewrites: number of pairs with an earlier key and a new value, after the others; the latest value counts.
        queries: number of questions, about different keys; None: as many as pairs.
        keys: keys that there are.
        values: values that there are.
        filler: kinds of filler.
    """

    pairs: int = 16
    gap: int = 128
    rewrites: int = 0
    queries: int | None = None
    keys: int = 64
    values: int = 64
    filler: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.pairs <= self.keys:
            raise ValueError(f"pairs must lie between 1 and the number of keys, {self.keys}; got {self.pairs}")
        if not 0 <= self.rewrites <= self.pairs:
            raise ValueError(f"rewrites must lie between 0 and the number of pairs, {self.pairs}; got {self.rewrites}")
        if not 1 <= self.asked <= self.pairs:
            raise ValueError(f"queries must lie between 1 and the number of pairs, {self.pairs}; got {self.queries}")
        if self.gap < 0 or self.values < 2 or self.filler < 1:
            raise ValueError("gap must not be negative; there must be two values and one filler at least")

    @property
    def asked(self) -> int:
        """Number of questions of a sequence."""
        return self.pairs if self.queries is None else self.queries

    @property
    def vocabulary(self) -> int:
        """Number of different tokens: keys, values, fillers, in this order."""
        return self.keys + self.values + self.filler

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return 2 * (self.pairs + self.rewrites) + self.gap + self.asked

    @property
    def chance(self) -> float:
        """Accuracy of guessing. The ceiling is 1."""
        return 1 / self.values

    def sample(self, batch: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw sequences: tokens and targets, (batch, length) int64 each; targets are values where a key is asked."""

        def choose(limit: int, count: int) -> Tensor:
            return torch.rand((batch, limit), generator=generator).argsort(1)[:, :count]

        keys = choose(self.keys, self.pairs)
        value = torch.randint(self.values, (batch, self.pairs), generator=generator)
        again = choose(self.pairs, self.rewrites)
        fresh = (value.gather(1, again) + torch.randint(1, self.values, again.shape, generator=generator)) % self.values
        written = torch.cat((keys, keys.gather(1, again)), dim=1)
        put = torch.cat((value, fresh), dim=1) + self.keys
        latest = value.scatter(1, again, fresh)
        asked = choose(self.pairs, self.asked)
        filler = torch.randint(self.filler, (batch, self.gap), generator=generator) + self.keys + self.values
        pairs = torch.stack((written, put), dim=2).flatten(1)
        tokens = torch.cat((pairs, filler, keys.gather(1, asked)), dim=1)
        targets = torch.full_like(tokens, IGNORED)
        targets[:, -self.asked :] = latest.gather(1, asked) + self.keys
        return tokens, targets


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """Compute the share of the questions whose likeliest token is the answer."""
    asked = targets != IGNORED
    return float((logits.argmax(-1) == targets)[asked].float().mean())
