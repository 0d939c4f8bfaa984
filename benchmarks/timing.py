"""What the benchmarks of speed share: fair medians, and what they ran on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch


def medians(runs: Mapping[str, Callable[[], object]], repeats: int, seconds: float = 0.02) -> dict[str, float]:
    """Median seconds of one call of each; see `times`."""
    return {name: median(values) for name, values in times(runs, repeats, seconds).items()}


def minima(runs: Mapping[str, Callable[[], object]], repeats: int, seconds: float = 0.001) -> dict[str, float]:
    """Least seconds of one call of each, for what short calls cost a core whose neighbours are busy; see `times`."""
    return {name: min(values) for name, values in times(runs, repeats, seconds).items()}


def times(runs: Mapping[str, Callable[[], object]], repeats: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of one call of each, as often as it is measured.

    The calls are interleaved, so that a disturbance of the machine meets all of them, and short ones are repeated until
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
