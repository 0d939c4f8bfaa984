"""Which chunks are outliers, kept as they are: Med3x and its relatives.

Med3x (HQMQ, arXiv 2605.27646): a chunk whose radius is over C = 3 times the median radius is kept as four half-precision
numbers and flagged. The rules differ in what the median is taken over:

- "paper": all chunks of the call, of one (layer, head, role), over batch and tokens; where a call has few, a running
  median over the calls so far, which the authors recommend and do not have;
- "authors": all chunks of the call, however few, as their code does;
- "vector": the chunks of the same vector. Ours: the result for a token depends on nothing but the token.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

OutlierRule = Literal["vector", "paper", "authors"]

#: Chunks per head below which a call alone does not give a good median.
FEW = 512


class RunningMedian:
    """Median of all radii seen so far, per head, to within 1 %: a histogram of logarithms, in constant memory."""

    STEPS, LOWEST, BINS = 64, -40, 64 * 80  # per octave, log2 of the smallest radius told from zero, in all

    def __init__(self, heads: int) -> None:
        self.counts = torch.zeros(heads, self.BINS, dtype=torch.long)

    def update(self, radii: Tensor) -> Tensor:
        """Add radii (heads, n) and give the median (heads,) of everything added."""
        bins = ((radii.clamp(min=2.0**self.LOWEST).log2() - self.LOWEST) * self.STEPS).long().clamp(0, self.BINS - 1)
        self.counts.scatter_add_(1, bins.cpu(), torch.ones_like(bins, device="cpu"))
        half = (self.counts.sum(1, keepdim=True) + 1) // 2
        middle = (self.counts.cumsum(1) >= half).int().argmax(1)
        return torch.exp2((middle.float() + 0.5) / self.STEPS + self.LOWEST).to(radii)


def median_over_call(radii: Tensor) -> Tensor:
    """radii: (batch, heads, tokens, chunks) -> (heads,)."""
    return radii.transpose(0, 1).flatten(1).median(1).values


def find_outliers(radii: Tensor, factor: float, rule: OutlierRule, running: RunningMedian | None) -> Tensor:
    """Which chunks to keep as they are.

    Args:
        radii: (batch, heads, tokens, chunks).
        factor: the paper's C.
        rule: see above.
        running: for the rule "paper": the state that calls share; it takes in this call's radii.

    Returns:
        bool, of the shape of `radii`.
    """
    if radii.numel() == 0:
        return torch.zeros_like(radii, dtype=torch.bool)
    if rule == "vector":
        median = radii.median(-1, keepdim=True).values
    else:
        over_call = median_over_call(radii)
        if rule == "paper" and running is not None:
            so_far = running.update(radii.transpose(0, 1).flatten(1))
            if radii.numel() // radii.shape[1] < FEW:
                over_call = so_far
        median = over_call[None, :, None, None]
    return radii > factor * median
