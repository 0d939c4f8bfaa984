"""The parameters of attention to one part of a sequence."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True, eq=False)
class AttendParams:
    """The visibility of keys for queries, and the transformation of scores before the softmax.

    Attributes:
        scale: multiplies the scores.
        mask: (batch or 1, q_heads or 1, q_tokens, tokens) bool, True where a query sees a key; None: no mask.
        softcap: scores become softcap · tanh(score / softcap); None: they stay.
        start: number that the first query would have among these keys; query i then sees no key after start + i. None: all.
        window: with `start`, query i sees no key before start + i - window + 1; None, or without `start`: all.
    """

    scale: float
    mask: Tensor | None = None
    softcap: float | None = None
    start: int | None = None
    window: int | None = None

    def queries(self, a: int, b: int) -> AttendParams:
        """Return the parameters for queries [a, b) only."""
        mask = None if self.mask is None else self.mask[:, :, a:b]
        return replace(self, mask=mask, start=None if self.start is None else self.start + a)

    def keys(self, tokens: int, queries: int) -> tuple[int, int]:
        """Return the range [first, end) of the `tokens` keys that any of `queries` queries can see by position."""
        if self.start is None:
            return 0, tokens
        begin = 0 if self.window is None else max(0, self.start - self.window + 1)
        return begin, min(tokens, self.start + queries)

    def check(self, queries: int, tokens: int) -> None:
        """Refuse a mask of another shape.

        Raises:
            ValueError: naming both shapes.
        """
        if self.mask is not None and self.mask.shape[-2:] != (queries, tokens):
            raise ValueError(f"mask {tuple(self.mask.shape)} does not fit {queries} queries and {tokens} keys")
