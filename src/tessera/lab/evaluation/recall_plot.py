"""The picture of recall: accuracy against the number of pairs, the width of a head, the gap, and the bytes of state."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from statistics import mean
from typing import Any

from tessera.files import atomic_path

#: Colour and marker of each method, the same in all panels. Colours after Okabe and Ito.
STYLES = {
    "dense": ("#000000", "X"),
    "window": ("#999999", "*"),
    "window + sinks": ("#E69F00", "v"),
    "Infini-attention": ("#CC79A7", "s"),
    "Tensor Cache, delta": ("#0072B2", "o"),
    "Tensor Cache, outer": ("#56B4E9", "D"),
    "Tensor Cache, delta, rotary": ("#009E73", "^"),
    "Tensor Cache, the paper's setting": ("#D55E00", "P"),
}

Rows = Sequence[dict[str, Any]]


def plot_recall(rows: Rows, path: str | os.PathLike[str]) -> None:
    """Draw four panels as PNG: the mean of the seeds, with bars from the lowest to the highest.

    Raises:
        ValueError: if there are no rows.
    """
    if not rows:
        raise ValueError("there is nothing to draw: no model has been measured")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plain = [row for row in rows if not row["rewrites"]] or list(rows)
    # The task that most models were trained on; the others differ from it in one field.
    (pairs, dim, *rest), _ = Counter(map(_task, plain)).most_common(1)[0]
    base = [row for row in plain if _task(row) == (pairs, dim, *rest)]
    by_pairs = _varied([row for row in plain if _task(row)[1:] == (dim, *rest)], "pairs")
    by_dim = _varied([row for row in plain if (row["pairs"], *_task(row)[2:]) == (pairs, *rest)], "dim")
    by_gap = [{**row, "asked": int(at), "accuracy": found} for row in base for at, found in row["by_gap"].items()]
    gap = rest[0]

    filler = f"gap between pairs and questions (tokens; {gap} in training)"
    titles = {
        "pairs": (by_pairs, f"by pairs (width {dim}, gap {gap})", "pairs in a sequence"),
        "dim": (by_dim, f"by width ({pairs} pairs, gap {gap})", "width d of a head (channels)"),
        "asked": (by_gap, f"by gap ({pairs} pairs, width {dim})", filler),
    }
    # A panel without a varied field would show a single column of points.
    panels = [name for name, (own, *_) in titles.items() if len({row[name] for row in own}) > 1]
    tall = (len(panels) + 2) // 2
    figure, grid = pyplot.subplots(tall, 2, figsize=(10.5, 3.4 * tall + 1), squeeze=False, layout="constrained")
    *lines, last = grid.flatten()[: len(panels) + 1]
    for axis in grid.flatten()[len(panels) + 1 :]:
        axis.remove()
    for axis, name in zip(lines, panels, strict=True):
        own, title, label = titles[name]
        _lines(axis, own, name, base[0]["chance"])
        axis.set(title=title, xlabel=label)
        if name == "asked":
            place = sorted({row["asked"] for row in own}).index(gap)
            axis.axvline(place, color="0.6", lw=1, ls=":")
    _bars(last, base, pairs)
    last.set(title=f"by state ({pairs} pairs, width {dim}, gap {gap})", xlabel="pairs recalled per KiB of state")
    names = [name for name in STYLES if any(row["method"] == name for row in plain)]
    entries = [pyplot.Line2D([], [], color=STYLES[n][0], marker=STYLES[n][1], ms=6, lw=1.3) for n in names]
    entries.append(pyplot.Line2D([], [], color="0.5", lw=1, ls="--"))
    figure.legend(entries, [*names, "guessing"], loc="outside lower center", ncols=min(4, len(names) + 1), frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)


def _task(row: dict[str, Any]) -> tuple[int, ...]:
    return row["pairs"], row["dim"], row.get("gap", 64), row.get("symbols", 64), row["steps"]


def _varied(rows: Rows, name: str) -> list[dict[str, Any]]:
    """Return the rows of methods that were measured at more than one value."""
    places: dict[str, set[int]] = {}
    for row in rows:
        places.setdefault(row["method"], set()).add(row[name])
    return [row for row in rows if len(places[row["method"]]) > 1]


def _lines(axis: Any, rows: Rows, name: str, chance: float) -> None:
    """Draw accuracy against a field of the rows, a line for each method."""
    places = sorted({row[name] for row in rows})
    methods = [name for name in STYLES if any(row["method"] == name for row in rows)]
    for order, method in enumerate(methods):
        colour, marker = STYLES[method]
        found: dict[int, list[float]] = {}
        for row in rows:
            if row["method"] == method:
                found.setdefault(row[name], []).append(row["accuracy"])
        # Values are evenly spaced, because they double or begin at zero; lines are shifted, because equal ones would overlap.
        aside = 0.05 * (order - (len(methods) - 1) / 2)
        at = [places.index(place) + aside for place in sorted(found)]
        values = [found[place] for place in sorted(found)]
        middle = [mean(v) for v in values]
        both = list(zip(middle, values, strict=True))
        spread = [[m - min(v) for m, v in both], [max(v) - m for m, v in both]]
        axis.errorbar(at, middle, yerr=spread, color=colour, marker=marker, ms=5, lw=1.2, capsize=2, elinewidth=0.8)
    axis.axhline(chance, color="0.5", lw=1, ls="--")
    axis.set_xticks(range(len(places)), [f"{place:,}" for place in places])
    axis.set(ylabel="accuracy", ylim=(-0.03, 1.08), xlim=(-0.5, len(places) - 0.5))
    axis.grid(alpha=0.25)


def _bars(axis: Any, rows: Rows, pairs: int) -> None:
    """Draw pairs recalled for each KiB, a bar for each method, with its bytes beside it."""
    names = [name for name in reversed(STYLES) if any(row["method"] == name for row in rows)]
    for place, name in enumerate(names):
        own = [row for row in rows if row["method"] == name]
        kept = own[0]["state_bytes"] / 1024
        worth = pairs * mean(row["accuracy"] for row in own) / kept
        axis.barh(place, worth, color=STYLES[name][0], height=0.7)
        axis.text(worth, place, f"  {kept:,.0f} KiB", va="center", fontsize=9)
    axis.set_yticks(range(len(names)), [name.replace(", the", ",\nthe") for name in names], fontsize=9)
    axis.margins(x=0.18)
    axis.set_axisbelow(True)
    axis.grid(alpha=0.25, axis="x")
