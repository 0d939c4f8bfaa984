"""No harm: a counter whose next value follows from the current one, to check that a memory does no harm where none is needed.

`NoHarm()` is the original of arXiv 2605.27686. With rule "given", symbols are random, and the target is the symbol a number of
steps further that only the first token gives: it has to be remembered for the whole sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor
from torch.nn.functional import one_hot

from tessera.lab.tasks.associative_recall import IGNORED


@dataclass(frozen=True)
class NoHarm:
    """The task.

    Attributes:
        symbols: V.
        steps: number of symbols of a sequence with a question.
        rule: "one": s_t = s_{t-1} + 1 mod V, and the next is asked for. "given": every s_t is random, and s_t + d mod V is
            asked for, with d in the first token.
        delay: blank tokens before the symbols.
    """

    symbols: int = 16
    steps: int = 32
    rule: Literal["one", "given"] = "one"
    delay: int = 0

    def __post_init__(self) -> None:
        if self.rule not in ("one", "given"):
            raise ValueError(f"rule must be 'one' or 'given', got {self.rule!r}")
        if self.symbols < 2 or self.steps < 1 or self.delay < 0:
            raise ValueError(f"symbols must be at least 2, steps 1, delay 0; got {self.symbols}, {self.steps}, {self.delay}")

    frame = 1
    """Tokens of a frame."""
    ceiling = 1.0
    """Accuracy of the best answer."""

    @property
    def features(self) -> int:
        """Number of features of a token: a symbol and a rule, one-hot."""
        return 2 * self.symbols

    @property
    def classes(self) -> int:
        """Number of possible answers."""
        return self.symbols

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return (self.rule == "given") + self.delay + self.steps

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return 1 / self.symbols

    @property
    def stateless(self) -> float:
        """Accuracy of the best answer from the current token."""
        return 1.0 if self.rule == "one" else self.chance

    def sample(self, batch: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw sequences: tokens, (batch, length, features), and targets, (batch, length) int64, at every symbol."""
        if self.rule == "one":
            start = torch.randint(self.symbols, (batch, 1), generator=generator)
            shown = (start + torch.arange(self.steps)) % self.symbols
            further = torch.ones(batch, dtype=torch.long)
        else:
            shown = torch.randint(self.symbols, (batch, self.steps), generator=generator)
            further = torch.randint(self.symbols, (batch,), generator=generator)
        tokens = torch.zeros(batch, self.length, self.features)
        tokens[:, -self.steps :, : self.symbols] = one_hot(shown, self.symbols).float()
        if self.rule == "given":
            tokens[:, 0, self.symbols :] = one_hot(further, self.symbols).float()
        targets = torch.full((batch, self.length), IGNORED)
        targets[:, -self.steps :] = (shown + further[:, None]) % self.symbols
        return tokens, targets
