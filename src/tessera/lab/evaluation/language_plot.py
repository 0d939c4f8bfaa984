"""The picture of losses by position: how much each attention loses against the dense one."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from statistics import mean
from typing import Any

from tessera.files import atomic_path

#: Colours after Okabe and Ito, and markers, in the order of the rows.
STYLES = (
    ("#999999", "*"),
    ("#E69F00", "v"),
    ("#56B4E9", "D"),
    ("#0072B2", "o"),
    ("#CC79A7", "s"),
    ("#009E73", "^"),
    ("#D55E00", "P"),
)


def plot_language(
    rows: Sequence[dict[str, Any]], edges: Sequence[int], path: str | os.PathLike[str], name: str = "name"
) -> None:
    """Draw as PNG what is lost against "dense", by stretch: the mean of the seeds, with bars from the lowest to the highest.

    Args:
        rows: with ``losses`` of each stretch, of several seeds where there are.
        edges: edges of the stretches.
        path: path of the picture.
        name: field that names the attention.

    Raises:
        ValueError: if no row is "dense".
    """
    found: dict[str, list[list[float]]] = {}
    for row in rows:
        found.setdefault(row[name], []).append(row["losses"])
    if "dense" not in found:
        raise ValueError(f"there is nothing to compare with: no row is 'dense', only {', '.join(found)}")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    least = [mean(values) for values in zip(*found.pop("dense"), strict=True)]
    figure, axis = pyplot.subplots(figsize=(9, 4.6), layout="constrained")
    for order, (label, own) in enumerate(found.items()):
        colour, marker = STYLES[order % len(STYLES)]
        lost = [[loss - base for loss, base in zip(losses, least, strict=True)] for losses in own]
        by_stretch = list(zip(*lost, strict=True))
        middle = [mean(values) for values in by_stretch]
        spread = [
            [m - min(v) for m, v in zip(middle, by_stretch, strict=True)],
            [max(v) - m for m, v in zip(middle, by_stretch, strict=True)],
        ]
        # Drawn side by side, because equal values would hide each other.
        at = [place + 0.05 * (order - (len(found) - 1) / 2) for place in range(len(middle))]
        axis.errorbar(at, middle, yerr=spread, color=colour, marker=marker, ms=6, lw=1.2, capsize=3, label=label)
    axis.axhline(0, color="black", lw=0.8)
    axis.set_xticks(range(len(least)), [f"{a:,}–{b:,}" for a, b in itertools.pairwise(edges)])
    axis.set(xlabel="position in the sequence (tokens)", ylabel="loss above the dense model's (nats per token)")
    axis.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)
