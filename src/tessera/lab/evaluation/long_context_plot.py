"""Heat maps of retrieval from long texts: depth by length for each cache, and task by cache for each length."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from tessera.files import atomic_path
from tessera.lab.evaluation.long_context import incapable, over, specs_of

Rows = Sequence[dict[str, Any]]
#: From dark blue (nothing) to yellow (all); its lightness tells values apart for every kind of colour vision, and in print.
COLOURS = "cividis"


def plot_needle(rows: Rows, path: str | os.PathLike[str]) -> None:
    """Draw the share of needles found as PNG: a panel for each cache, lengths across, depths down."""
    specs, lengths = specs_of(rows), sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    wide = min(4, len(specs))
    tall = -(-len(specs) // wide)
    size = (1.2 + wide * max(2.1, 0.75 * len(lengths)), 1.3 + tall * (0.8 + 0.3 * len(depths)))
    with _figure(path, tall, wide, size) as (figure, axes):
        for axis, spec in zip(axes, specs, strict=False):
            values = [[over(rows, "scores", spec=spec, length=n, depth=depth) for n in lengths] for depth in depths]
            image = _map(axis, values, [f"{n:,}" for n in lengths], [f"{depth}" for depth in depths])
            axis.set_title(spec.replace(" + recent", "\n+ recent"), fontsize=10)
        for axis in axes[len(specs) :]:
            axis.remove()
        figure.supxlabel("length of the text (tokens)", fontsize=11)
        figure.supylabel("depth of the needle (% of the text)", fontsize=11)
        _bar(figure, image, axes[: len(specs)], "needles found (%)")


def plot_ruler(rows: Rows, path: str | os.PathLike[str]) -> None:
    """Draw the scores as PNG: a panel for each length, tasks across, caches down; * where the exact cache fails too."""
    specs, lengths = specs_of(rows), sorted({row["length"] for row in rows})
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    size = (3.6 + 0.72 * len(tasks), 1.1 + len(lengths) * (1.25 + 0.36 * len(specs)))
    with _figure(path, len(lengths), 1, size) as (figure, axes):
        for axis, length in zip(axes, lengths, strict=True):
            names = [task + (" *" if incapable(rows, task=task, length=length) else "") for task in tasks]
            values = [[over(rows, "scores", spec=spec, length=length, task=task) for task in tasks] for spec in specs]
            image = _map(axis, values, names, specs)
            axis.tick_params("x", rotation=30)
            axis.set_title(f"{length:,} tokens", fontsize=10, loc="left")
        _bar(figure, image, axes, "score (%)")
        if any(incapable(rows, task=task, length=length) for task in tasks for length in lengths):
            figure.supxlabel("* the model scores less than one half with the exact cache", fontsize=9)


class _figure:
    """Yield a figure that is saved and closed when the block ends."""

    def __init__(self, path: str | os.PathLike[str], tall: int, wide: int, size: tuple[float, float]) -> None:
        self.path, self.shape, self.size = path, (tall, wide), size

    def __enter__(self) -> tuple[Any, list[Any]]:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        self.pyplot = pyplot
        self.figure, axes = pyplot.subplots(*self.shape, figsize=self.size, squeeze=False, layout="constrained")
        return self.figure, list(axes.flatten())

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            with atomic_path(self.path) as temporary:
                self.figure.savefig(temporary, dpi=120, format="png")
        self.pyplot.close(self.figure)


def _map(axis: Any, values: list[list[float | None]], across: list[str], down: list[str]) -> Any:
    numbers = [[float("nan") if value is None else value for value in line] for line in values]
    image = axis.imshow(numbers, vmin=0, vmax=1, cmap=COLOURS, aspect="auto")
    axis.set_xticks(range(len(across)), across, fontsize=9)
    axis.set_yticks(range(len(down)), down, fontsize=9)
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if value is not None:
                colour = "black" if value > 0.5 else "white"
                axis.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=9, color=colour)
    return image


def _bar(figure: Any, image: Any, axes: list[Any], words: str) -> None:
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02, ticks=[0, 0.5, 1], format=lambda x, _: f"{100 * x:.0f}")
    bar.set_label(words, fontsize=10)
