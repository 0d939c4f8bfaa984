"""The picture of caches' effects on each layer: one line for each specification, layers from left to right."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from tessera.evaluation.plot import LEAST_KL, STYLES
from tessera.evaluation.records import Comparison
from tessera.files import atomic_path

#: Colours after Okabe and Ito, with markers, so that lines can be told apart without colours.
LOOKS = [style for name, style in STYLES.items() if name != "window"]
#: Lines of more specifications than there are colours are dashed.
DASHES = ("-", "--", ":", "-.")


def plot_layers(comparisons: Sequence[Comparison], path: str | os.PathLike[str]) -> None:
    """Draw the KL of attention weights and the error of attention's output as PNG: two panels for each model and protocol."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    each = [(one, protocol) for one in comparisons for protocol in dict.fromkeys(row.protocol for row in one.layers)]
    specs = list(dict.fromkeys(row.spec for one in comparisons for row in one.layers))
    figure, axes = plt.subplots(len(each), 2, figsize=(13, 4.6 * len(each)), squeeze=False, layout="constrained")
    shown: dict[str, Any] = {}
    for pair, (one, protocol) in zip(axes, each, strict=True):
        for number, spec in enumerate(specs):
            own = [row for row in one.layers if (row.protocol, row.spec) == (protocol, spec)]
            colour, marker = LOOKS[number % len(LOOKS)]
            dash = DASHES[number // len(LOOKS) % len(DASHES)]
            look = {"color": colour, "marker": marker, "ms": 5, "lw": 1.3, "ls": dash}
            known = [(row.layer, max(row.kl, LEAST_KL)) for row in own if row.kl is not None]
            for axis, points in ((pair[0], known), (pair[1], [(row.layer, max(100 * row.error, 1e-4)) for row in own])):
                if points:
                    (shown[spec],) = axis.plot(*zip(*points, strict=True), **look)
        for which in (pair[1].yaxis.set_major_formatter, pair[1].yaxis.set_minor_formatter):
            which(FuncFormatter(lambda value, _: f"{value:g}"))
        for axis, what in zip(pair, ("KL of the rows of attention (nats)", "error of what attention gives (%)"), strict=True):
            axis.set_title(f"{one.model}, {protocol}", loc="left", fontsize=11)
            axis.set(xlabel="layer", ylabel=what, yscale="log")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(alpha=0.25, which="both")
    names = [spec for spec in specs if spec in shown]
    figure.legend([shown[spec] for spec in names], names, loc="outside lower center", ncols=min(4, len(names)), frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)
