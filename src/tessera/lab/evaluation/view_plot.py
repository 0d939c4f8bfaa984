"""Pictures of a Tensor Memory: magnitudes of its cells over time, and where tokens write and read."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from tessera.files import atomic_path
from tessera.lab.evaluation.traces import Trace

#: Colours of writes and of reads, in contrast to the map of |h|. After Okabe and Ito.
WRITE, READ = "#D55E00", "#56B4E9"
_MAP = "viridis"
_MOMENTS = 6


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_state(size: Tensor, path: str | os.PathLike[str], title: str = "") -> None:
    """Draw one state as PNG: a slice for each depth, and all cells in 3-D.

    Args:
        size: (*grid), |h| of each cell.
        path: path of the PNG.
        title: above it.
    """
    pyplot = _pyplot()
    cells = _solid(size)
    depth = len(cells)
    columns = math.ceil(math.sqrt(depth))
    rows = math.ceil(depth / columns)
    figure = pyplot.figure(figsize=(2.3 * columns + 4.6, max(3.6, 2.4 * rows) + 0.4), layout="constrained")
    grid = figure.add_gridspec(rows, columns + 2)
    top = max(float(cells.max()), 1e-9)
    picture = None
    for z, plane in enumerate(cells):
        axis = figure.add_subplot(grid[z // columns, z % columns])
        picture = axis.imshow(plane, origin="lower", cmap=_MAP, vmin=0, vmax=top, aspect="auto" if plane.shape[0] == 1 else 1)
        axis.set(xticks=[0, plane.shape[1] - 1], yticks=sorted({0, plane.shape[0] - 1}))
        axis.set_title(f"z = {z}" if depth > 1 else "all cells", fontsize=9)
    space = figure.add_subplot(grid[:, columns:], projection="3d")
    _in_space(space, cells, top)
    figure.colorbar(picture, ax=space, shrink=0.7, pad=0.12, label="|h|")
    if title:
        figure.suptitle(textwrap.fill(title, int(8 * figure.get_figwidth())), fontsize=10)
    _save(figure, path)


def plot_trace(traces: Sequence[Trace], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw a run as PNG: for each layer the cells at some steps, their magnitude over time, and the gates.

    Args:
        traces: traces of each layer.
        path: path of the PNG.
        title: above it.
    """
    pyplot = _pyplot()
    steps = traces[0].steps
    moments = sorted({round(i * steps / _MOMENTS) for i in range(1, _MOMENTS + 1)} - {0})
    layers = len(traces)
    gates = [trace.gate for trace in traces if trace.gate is not None]
    figure = pyplot.figure(figsize=(2.1 * _MOMENTS + 0.8, 2.5 * layers + 3.2), layout="constrained")
    grid = figure.add_gridspec(layers + 1, 6, height_ratios=[*[2.3] * layers, 2.4])
    for row, trace in enumerate(traces):
        top = max(float(trace.size.max()), 1e-9)
        before = 0
        for column, moment in enumerate(moments):
            axis = figure.add_subplot(grid[row, column])
            picture = _draw(axis, trace, moment, before, top)
            steps_of = f"steps {before + 1}-{moment}" if moment > before + 1 else f"step {moment}"
            axis.set_title(steps_of, fontsize=9)
            if column == 0:
                axis.set_ylabel(f"layer {row + 1}\ny (cells)" if layers > 1 or gates else "y (cells)", fontsize=9)
            if row == layers - 1:
                axis.set_xlabel("x (cells)", fontsize=9)
            before = moment
        label = "|h|, the most along z" if len(_solid(trace.size[0])) > 1 else "|h|"
        figure.colorbar(picture, ax=figure.axes[-len(moments) :], shrink=0.8, pad=0.01, label=label)
    width = 4 if gates else 6
    axis = figure.add_subplot(grid[layers, :width])
    for row, trace in enumerate(traces):
        total = trace.size.flatten(1).mean(1)
        axis.plot(range(steps + 1), total, label=f"layer {row + 1}: mean of |h|", color=f"C{row}")
        axis.plot(range(1, steps + 1), trace.sigma, color=f"C{row}", ls=":", label=f"layer {row + 1}: sigma of the writes")
    axis.set(xlabel="steps of the recurrence", ylabel="mean of |h|, sigma", ylim=(0, None), xlim=(0, steps))
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False, ncols=min(2, layers))
    if gates:
        axis = figure.add_subplot(grid[layers, width:])
        names = [f"layer {i + 1}" for i in range(len(gates))]
        bars = axis.bar(names, gates, color=[f"C{i}" for i in range(len(gates))], width=0.6)
        axis.bar_label(bars, [f"{gate:.2f}" for gate in gates], fontsize=9)
        at_first = traces[0].gate_at_first
        if at_first is not None:
            axis.axhline(at_first, color="0.4", lw=1, ls="--")
        axis.set(ylim=(0, 1))
        axis.set_title("gates" if at_first is None else "gates (dashed: at the start)", fontsize=9)
    entries = [
        pyplot.Line2D([], [], color=WRITE, marker="x", ls="", ms=6, mew=1.6),
        pyplot.Line2D([], [], color=READ, marker="o", ls="", ms=7, mfc="none", mew=1.4),
    ]
    figure.legend(entries, ["writes", "reads"], loc="outside lower center", ncols=2, frameon=False)
    if title:
        figure.suptitle(title, fontsize=11)
    _save(figure, path)


def animate(traces: Sequence[Trace], path: str | os.PathLike[str], title: str = "", frames: int = 64, fps: int = 6) -> None:
    """Draw a run as GIF: the cells of every layer with the write and the reads of each step, and below it all cells in 3-D.

    Args:
        traces: traces of each layer.
        path: path of the GIF.
        title: above it.
        frames: maximum number of frames; a longer run shows every n-th step.
        fps: frames a second.
    """
    pyplot = _pyplot()
    from matplotlib.animation import FuncAnimation, PillowWriter

    steps = traces[0].steps
    stride = math.ceil(steps / frames)
    layers = len(traces)
    figure = pyplot.figure(figsize=(3.4 * layers + 0.4, 7.2))
    flat = [figure.add_subplot(2, layers, 1 + i) for i in range(layers)]
    solid = [figure.add_subplot(2, layers, 1 + layers + i, projection="3d") for i in range(layers)]
    figure.subplots_adjust(left=0.12 / layers, right=1 - 0.12 / layers, top=0.86, bottom=0.06, hspace=0.25)
    tops = [max(float(trace.size.max()), 1e-9) for trace in traces]
    moments = list(range(stride, steps + 1, stride))

    def show(index: int) -> list[Any]:
        moment = moments[index]
        for layer, (axis, space, trace, top) in enumerate(zip(flat, solid, traces, tops, strict=True)):
            axis.clear()
            _draw(axis, trace, moment, max(0, moment - stride), top)
            axis.set_title(f"layer {layer + 1}" if layers > 1 else "", fontsize=9)
            space.clear()
            _in_space(space, _solid(trace.size[moment]), top)
        figure.suptitle(f"{textwrap.fill(title, int(9 * figure.get_figwidth()))}\nstep {moment} of {steps}".strip(), fontsize=8)
        return []

    show(0)
    with atomic_path(path) as temporary:
        FuncAnimation(figure, show, frames=len(moments), blit=False).save(temporary, writer=PillowWriter(fps=fps), dpi=80)
    pyplot.close(figure)


def _solid(size: Tensor) -> np.ndarray:
    """Reshape (*grid) to three axes; missing axes come first with one cell."""
    found: np.ndarray = size.numpy()
    return found.reshape((1,) * (3 - found.ndim) + found.shape)


def _in_space(space: Any, cells: np.ndarray, top: float) -> None:
    (_heights if len(cells) == 1 else _cloud)(space, cells, top)


def _cloud(space: Any, cells: np.ndarray, top: float) -> None:
    """Draw a ball for each cell, whose size is its magnitude."""
    z, y, x = (part.flatten() for part in np.indices(cells.shape))
    share = cells.flatten() / top
    # Nearly empty cells would hide those behind them.
    seen = share > 0.1
    colours = _pyplot().get_cmap(_MAP)(share[seen])
    colours[:, 3] = 0.25 + 0.7 * share[seen]
    space.scatter(x[seen], y[seen], z[seen], s=10 + 170 * share[seen] ** 2, c=colours, edgecolors="none", depthshade=False)
    limits = [(-0.5, size - 0.5) for size in reversed(cells.shape)]
    space.set(xlabel="x", ylabel="y", zlabel="z", xlim=limits[0], ylim=limits[1], zlim=limits[2])
    space.set_title("cells with more than a tenth of the most", fontsize=9)


def _heights(space: Any, cells: np.ndarray, top: float) -> None:
    """Draw a column for each cell of one plane."""
    y, x = (part.flatten() for part in np.indices(cells.shape[1:]))
    height = cells.flatten()
    colours = _pyplot().get_cmap(_MAP)(height / top)
    space.bar3d(x - 0.45, y - 0.45, np.zeros_like(height), 0.9, 0.9, height, color=colours, shade=True)
    space.set(xlabel="x", ylabel="y", zlabel="|h|", zlim=(0, top))


def _draw(axis: Any, trace: Trace, moment: int, before: int, top: float) -> Any:
    """Draw the cells after a step, seen along z, with the writes and reads of the steps after `before`."""
    flat = _solid(trace.size[moment]).max(0)
    height, width = flat.shape
    picture = axis.imshow(flat, origin="lower", cmap=_MAP, vmin=0, vmax=top, aspect="auto" if height == 1 else 1)

    def place(at: Tensor) -> tuple[np.ndarray, np.ndarray]:
        x = (at[:, 0].numpy() + 1) / 2 * (width - 1)
        y = (at[:, 1].numpy() + 1) / 2 * (height - 1) if at.shape[1] > 1 else np.zeros(len(at))
        return x, y

    axis.scatter(*place(trace.written[before:moment]), marker="x", s=32, color=WRITE, linewidths=1.5, zorder=3)
    reads = trace.read[before:moment].flatten(0, 1)
    axis.scatter(*place(reads), marker="o", s=46, facecolors="none", edgecolors=READ, linewidths=1.3, zorder=2)
    axis.set(xticks=sorted({0, width - 1}), yticks=sorted({0, height - 1}), xlim=(-0.5, width - 0.5), ylim=(-0.5, height - 0.5))
    return picture


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    _pyplot().close(figure)
