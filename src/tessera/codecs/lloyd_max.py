"""Levels of the best scalar quantiser for a known density (Lloyd 1957, Max 1960)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Points of the grid on which the density is sampled.
GRID = 200_001


def lloyd_max(density: Callable[[Tensor], Tensor], low: float, high: float, levels: int) -> Tensor:
    """Compute the levels that minimise the mean squared error of rounding to the nearest one.

    Args:
        density: density of the source, up to a factor; called with a float64 grid from `low` to `high`, which must hold all but
            a negligible part of it.
        low, high: the grid's ends.
        levels: number of levels.

    Returns:
        (levels,) float64, ascending.
    """
    x = torch.linspace(low, high, GRID, dtype=torch.float64)
    weight = density(x)
    # Cumulative mass and moment make the centroid of any interval a difference of two entries.
    mass = torch.cat((weight.new_zeros(1), weight.cumsum(0)))
    moment = torch.cat((weight.new_zeros(1), (weight * x).cumsum(0)))
    # The best levels have the density of the source to the power 1/3.
    spread = weight.pow(1 / 3).cumsum(0)
    targets = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels * spread[-1]
    level = x[torch.searchsorted(spread, targets).clamp(max=GRID - 1)]
    for _ in range(20_000):
        edge = torch.searchsorted(x, (level[1:] + level[:-1]) / 2)
        edge = torch.cat((edge.new_zeros(1), edge, edge.new_full((1,), GRID)))
        new = moment[edge].diff() / mass[edge].diff()
        if (new - level).abs().max() < 1e-9 * (high - low):
            return new
        level = new
    return level
