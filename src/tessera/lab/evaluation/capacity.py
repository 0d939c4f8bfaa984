"""The capacity of one matrix: random unit keys and values are stored one after the other, then every key is read.

A pair counts as recalled if of all stored values its own is nearest to the read. Beside it the O(d) line: a linear
associative memory of width d holds about d pairs before they interfere.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from rich.table import Table
from torch.nn.functional import normalize

from tessera.files import atomic_path
from tessera.tensor_cache.scan import scan
from tessera.tensor_cache.tensor_cache_config import Rule

WIDTHS = (16, 32, 64, 128)
"""Default widths of a matrix."""

SETTINGS: dict[str, tuple[Rule, float, float]] = {
    "outer, no decay": ("outer", 1.0, 1.0),
    "delta, no decay, rate 1": ("delta", 1.0, 1.0),
    "delta, no decay, rate 0.5": ("delta", 1.0, 0.5),
    "outer, decay 0.995, rate 0.05": ("outer", 0.995, 0.05),
    "delta, decay 0.995, rate 0.05": ("delta", 0.995, 0.05),
}
"""Name -> rule, decay, write rate. The last two are the paper's setting."""

#: Colour, after Okabe and Ito, and marker of each setting.
STYLES = (("#000000", "o"), ("#E69F00", "v"), ("#0072B2", "s"), ("#D55E00", "^"), ("#56B4E9", "D"))
LOADS = (0.25, 0.5, 1, 2, 4, 8)
"""Numbers of stored pairs, in multiples of the width."""


@torch.no_grad()
def recalled(rule: Rule, decay: float, rate: float, dim: int, pairs: int, trials: int, seed: int) -> float:
    """Measure the share of the pairs that are recalled, over `trials` memories."""
    generator = torch.Generator().manual_seed(seed)
    k = normalize(torch.randn((1, trials, pairs, dim), generator=generator), dim=-1)
    v = torch.randn((1, trials, pairs, dim), generator=generator)
    g, eta = torch.full((1, trials, pairs), math.log(decay)), torch.full((1, trials, pairs), rate)
    nothing = k.new_zeros((1, trials, 1, pairs, dim))
    _, state = scan(nothing, k, v, g, eta, k.new_zeros((1, trials, dim, dim)), rule)
    # Decay shortens values, so they are compared by direction.
    near = normalize(k @ state, dim=-1) @ normalize(v, dim=-1).transpose(-1, -2)
    return float((near.argmax(-1) == torch.arange(pairs)).float().mean())


def capacity(widths: Sequence[int] = WIDTHS, trials: int = 16) -> Iterator[list[dict[str, Any]]]:
    """Measure every setting; yields the rows of one width after the other.

    Raises:
        ValueError: for a width below 4, of which a quarter is no pair, or no trial.
    """
    if not widths or min(widths) < 4:
        raise ValueError(f"a width must be at least 4, got {list(widths)}")
    if trials < 1:
        raise ValueError(f"there must be a trial at least, got {trials}")
    return (_rows(dim, trials) for dim in widths)


def _rows(dim: int, trials: int) -> list[dict[str, Any]]:
    rows = []
    for load in LOADS:
        pairs = int(load * dim)
        for name, (rule, decay, rate) in SETTINGS.items():
            share = recalled(rule, decay, rate, dim, pairs, trials, seed=dim)
            rows.append({"dim": dim, "pairs": pairs, "setting": name, "recalled": share})
    return rows


def capacity_table(rows: Iterable[dict[str, Any]]) -> Table:
    """Make the table of shares by width and number of pairs."""
    found: dict[tuple[int, int], dict[str, float]] = {}
    for row in rows:
        found.setdefault((row["dim"], row["pairs"]), {})[row["setting"]] = row["recalled"]
    table = Table("d", "pairs", *SETTINGS)
    for (dim, pairs), shares in sorted(found.items()):
        table.add_row(str(dim), str(pairs), *(f"{shares[name]:.2f}" for name in SETTINGS))
    return table


def plot_capacity(rows: Sequence[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw a panel per width, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    widths = sorted({row["dim"] for row in rows})
    across = min(2, len(widths))
    tall = -(-len(widths) // across)
    size = (4.0 * across + 0.4, 2.7 * tall + 0.9)
    figure, axes = pyplot.subplots(tall, across, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, dim in zip(axes.flatten(), widths, strict=False):
        for name, (colour, marker) in zip(SETTINGS, STYLES, strict=True):
            points = [(r["pairs"], r["recalled"]) for r in rows if r["dim"] == dim and r["setting"] == name]
            axis.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5, linewidth=1.3, label=name)
        axis.axvline(dim, color="0.4", linestyle=":", linewidth=1.2, label="as many pairs as the width d")
        axis.set_xscale("log", base=2)
        axis.set(title=f"d = {dim}", xlabel="pairs stored", ylim=(0, 1.05))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.25)
    for axis in axes.flatten()[len(widths) :]:
        axis.remove()
    for axis in axes[:, 0]:
        axis.set_ylabel("share of pairs recalled")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)
