"""The picture of the diagnostics: accuracy of every kind by task, between guessing and the ceiling; by delay; by setting."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from tessera.files import atomic_path
from tessera.lab.evaluation.diagnostics import ABLATIONS, SETTINGS, by_delay, by_kind, by_setting
from tessera.lab.evaluation.jobs import Row
from tessera.lab.models.backbones import KINDS

#: Colour and marker of each kind. Colours after Okabe and Ito.
STYLES = {"plain": ("#999999", "X"), "wide": ("#E69F00", "v"), "slots": ("#CC79A7", "s"), "memory": ("#0072B2", "o")}
#: Colour and marker of each task, by the beginning of its title; the same in all panels.
_TASK_STYLES = (
    ("occlusion, 4 of 8 hidden, asked while", "#0072B2", "o"),
    ("occlusion, 4 of 8 hidden, asked when", "#D55E00", "s"),
    ("map", "#009E73", "^"),
    ("binding", "#CC79A7", "D"),
    ("no harm", "#E69F00", "v"),
    ("", "#000000", "P"),
)


def plot_diagnostics(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Draw the rows as PNG: a point for each seed, a bar at their mean.

    Raises:
        ValueError: if there are no rows.
    """
    if not rows:
        raise ValueError("there is nothing to draw: no model has been measured")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = by_kind(rows)
    names, settings = by_setting(rows, {**SETTINGS, **ABLATIONS})
    delays = _by_delay(rows)
    tall = [0.5 + 0.36 * len(kinds), *([0.5 + 0.3 * len(names)] if settings else []), *([3.0] if delays else [])]
    figure, axes = pyplot.subplots(
        len(tall), 1, figsize=(9.5, sum(tall) + 1.6), height_ratios=tall, squeeze=False, layout="constrained"
    )
    panels = list(axes.flatten())
    _by_task(panels.pop(0), kinds)
    if settings:
        _by_setting(panels.pop(0), settings, names)
    if delays:
        _lines(panels.pop(0), delays)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)


def _by_task(axis: Any, kinds: dict[str, dict[str, list[Row]]]) -> None:
    from matplotlib.lines import Line2D

    for place, own in enumerate(kinds.values()):
        row = next(iter(own.values()))[0]
        axis.plot([row["chance"], row["ceiling"]], [place, place], color="0.85", lw=9, solid_capstyle="butt", zorder=1)
        axis.plot([row["stateless"]] * 2, [place - 0.36, place + 0.36], color="0.35", lw=1.4, zorder=2)
        for order, kind in enumerate(KINDS):
            found = [r["accuracy"] for r in own.get(kind, ())]
            colour, marker = STYLES[kind]
            # Drawn side by side, because equal values would hide each other.
            at = place + 0.15 * (order - 1.5)
            axis.plot(found, [at] * len(found), marker, color=colour, ms=6, alpha=0.85, ls="", zorder=3)
    entries = [Line2D([], [], color=STYLES[k][0], marker=STYLES[k][1], ls="", ms=6) for k in KINDS]
    entries += [Line2D([], [], color="0.35", lw=1.4), Line2D([], [], color="0.85", lw=9)]
    words = [*KINDS, "best from the current frame", "from guessing to the ceiling"]
    axis.legend(entries, words, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, frameon=False, fontsize=10)
    axis.set_yticks(range(len(kinds)), list(kinds), fontsize=10)
    axis.set(xlim=(-0.02, 1.04), ylim=(len(kinds) - 0.4, -0.6), xlabel="accuracy")
    axis.grid(alpha=0.25, axis="x")
    axis.set_axisbelow(True)


def _by_setting(axis: Any, settings: dict[str, dict[str, list[Row]]], names: list[str]) -> None:
    for order, (task, own) in enumerate(settings.items()):
        aside = 0.12 * (order - (len(settings) - 1) / 2)
        for place, name in enumerate(names):
            found = [r["accuracy"] for r in own.get(name, ())]
            label = task if place == 0 else None
            colour, marker = _style(task)
            style = {"color": colour, "marker": marker, "ms": 5, "ls": "", "alpha": 0.85, "label": label}
            axis.plot(found, [place + aside] * len(found), **style)
    axis.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2, frameon=False, fontsize=10)
    axis.set_yticks(range(len(names)), names, fontsize=10)
    axis.set(xlim=(-0.02, 1.04), ylim=(len(names) - 0.4, -0.6), xlabel="accuracy of the memory, by setting")
    axis.grid(alpha=0.25, axis="x")


def _style(task: str) -> tuple[str, str]:
    """Return colour and marker of a task by its title."""
    return next((colour, marker) for begin, colour, marker in _TASK_STYLES if task.startswith(begin))


def _by_delay(rows: Sequence[Row]) -> dict[str, dict[int, list[float]]]:
    """Draw the memory's accuracy by delay, for tasks measured at several."""
    found: dict[str, dict[int, list[float]]] = {}
    for (name, setting), own in by_delay(rows).items():
        for delay, accuracy in (pair for row in own for pair in row["by_delay"].items() if setting == "default"):
            found.setdefault(name, {}).setdefault(int(delay), []).append(accuracy)
    return found


def _lines(axis: Any, delays: dict[str, dict[int, list[float]]]) -> None:
    places = sorted({delay for own in delays.values() for delay in own})
    for name, own in delays.items():
        colour, marker = _style(name)
        at = sorted(own)
        middle = [sum(own[d]) / len(own[d]) for d in at]
        # Lines that lie on each other are told apart by dashes and by the size of their markers.
        dashed = {"ls": "--", "ms": 9, "mfc": "none"} if "back" in name else {"ls": "-", "ms": 5}
        axis.plot([places.index(d) for d in at], middle, marker=marker, color=colour, lw=1.3, label=name, **dashed)
    axis.set_xticks(range(len(places)), [f"{d:,}" for d in places])
    axis.set(ylim=(-0.03, 1.05), xlabel="blank tokens before the question", ylabel="accuracy of the memory")
    axis.legend(loc="lower center", bbox_to_anchor=(0.3, 1.0), ncols=2, frameon=False, fontsize=10)
    axis.grid(alpha=0.25)
