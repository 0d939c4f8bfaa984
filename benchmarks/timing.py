"""Time several functions by interleaved calls, and describe the machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch


def medians(runs: Mapping[str, Callable[[], object]], repeats: int, seconds: float = 0.02) -> dict[str, float]:
    """Return the median seconds of one call of each; see `times`."""
    return {name: median(values) for name, values in times(runs, repeats, seconds).items()}


def minima(runs: Mapping[str, Callable[[], object]], repeats: int, seconds: float = 0.001) -> dict[str, float]:
    """Return the minimum seconds of one call of each, for short calls on a core disturbed by others; see `times`."""
    return {name: min(values) for name, values in times(runs, repeats, seconds).items()}


def times(runs: Mapping[str, Callable[[], object]], repeats: int, seconds: float) -> dict[str, list[float]]:
    """Return the seconds of one call of each, for every repetition.

    The calls are interleaved, so that a disturbance of the machine affects all of them, and short ones are repeated until
    they take about `seconds`.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    loops = {}
    for name, run in runs.items():
        run()
        began = time.perf_counter()
        run()
        loops[name] = max(1, int(seconds / max(time.perf_counter() - began, 1e-7)))
    for _ in range(repeats):
        for name, run in runs.items():
            began = time.perf_counter()
            for _ in range(loops[name]):
                run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            found[name].append((time.perf_counter() - began) / loops[name])
    return found
