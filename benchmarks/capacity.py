"""How many pairs one matrix holds: random unit keys and values, stored one after the other, then every key is asked.

A pair counts as recalled if of all stored values its own is nearest to what is read. Beside it the O(d) line: a linear
associative memory of width d holds about d pairs before they interfere.

Example:

    python benchmarks/capacity.py
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn.functional import normalize

from tessera.associative.config import Rule
from tessera.associative.scan import scan
from tessera.evaluation.records import environment
from tessera.files import atomic_path

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = (16, 32, 64, 128)
#: Name -> rule, decay, write rate. The last two are the paper's setting.
SETTINGS: dict[str, tuple[Rule, float, float]] = {
    "outer, no decay": ("outer", 1.0, 1.0),
    "delta, no decay, rate 1": ("delta", 1.0, 1.0),
    "delta, no decay, rate 0.5": ("delta", 1.0, 0.5),
    "outer, decay 0.995, rate 0.05": ("outer", 0.995, 0.05),
    "delta, decay 0.995, rate 0.05": ("delta", 0.995, 0.05),
}


@torch.no_grad()
def recalled(rule: Rule, decay: float, rate: float, dim: int, pairs: int, trials: int, seed: int) -> float:
    """Share of the pairs that are recalled, over `trials` memories."""
    generator = torch.Generator().manual_seed(seed)
    k = normalize(torch.randn((1, trials, pairs, dim), generator=generator), dim=-1)
    v = torch.randn((1, trials, pairs, dim), generator=generator)
    g, eta = torch.full((1, trials, pairs), math.log(decay)), torch.full((1, trials, pairs), rate)
    nothing = k.new_zeros((1, trials, 1, pairs, dim))
    _, state = scan(nothing, k, v, g, eta, k.new_zeros((1, trials, dim, dim)), rule)
    # A decayed value is shorter than it was, so values are compared by direction.
    near = normalize(k @ state, dim=-1) @ normalize(v, dim=-1).transpose(-1, -2)
    return float((near.argmax(-1) == torch.arange(pairs)).float().mean())


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel per width."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(WIDTHS), figsize=(3.1 * len(WIDTHS), 3.2), sharey=True, layout="constrained")
    for axis, dim in zip(axes, WIDTHS, strict=True):
        for name in SETTINGS:
            points = [(r["pairs"], r["recalled"]) for r in rows if r["dim"] == dim and r["setting"] == name]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.3, label=name)
        axis.axvline(dim, color="0.6", linestyle=":", linewidth=1)
        axis.text(dim, 1.03, "d", color="0.4", ha="center", fontsize=8)
        axis.set_xscale("log", base=2)
        axis.set(title=f"d = {dim}", xlabel="pairs stored", ylim=(0, 1.08))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("pairs recalled")
    axes[0].legend(fontsize=6.5, loc="lower left")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    pyplot.close(figure)


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=16, help="memories that are averaged")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "capacity.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "images" / "capacity.png")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for dim in track(WIDTHS, "storing", console=Console(stderr=True), transient=True):
        for pairs in (dim // 4, dim // 2, dim, 2 * dim, 4 * dim, 8 * dim):
            for name, (rule, decay, rate) in SETTINGS.items():
                share = recalled(rule, decay, rate, dim, pairs, options.trials, seed=dim)
                rows.append({"dim": dim, "pairs": pairs, "setting": name, "recalled": share})
    record = {"environment": environment(), "trials": options.trials, "rows": rows}
    with atomic_path(options.json) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    plot(rows, options.plot)
    table = Table("d", "pairs", *SETTINGS)
    for dim in WIDTHS:
        for pairs in sorted({r["pairs"] for r in rows if r["dim"] == dim}):
            cells = [f"{r['recalled']:.2f}" for r in rows if (r["dim"], r["pairs"]) == (dim, pairs)]
            table.add_row(str(dim), str(pairs), *cells)
    Console().print(table)
    Console().print(f"Saved {options.json} and {options.plot}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
