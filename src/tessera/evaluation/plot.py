"""The picture of a comparison: loss against true bits, one line for each method.

Where nothing is compressed, as with windows alone, loss against bytes, one point for each cache.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from tessera.evaluation.methods import method
from tessera.evaluation.records import Comparison, Row
from tessera.files import atomic_path

#: Colour and marker by method: one that is in two pictures looks the same in both. Colours after Okabe and Ito.
STYLES = {
    "HQMQ, Tessera's": ("#0072B2", "o"),
    "HQMQ, optimised directions": ("#56B4E9", "o"),
    "HQMQ, the paper's": ("#CC79A7", "s"),
    "Hadamard + Lloyd–Max": ("#D55E00", "^"),
    "llama.cpp blocks": ("#009E73", "D"),
    "int, round to nearest": ("#E69F00", "v"),
    "KIVI": ("#7F7F7F", "P"),
    "fp8": ("#000000", "X"),
    "window": ("#999999", "*"),
}
#: KL under this is drawn at it: a logarithmic axis has no zero.
LEAST_KL = 1e-6
#: Ticks of the axis of perplexity, in percent, which is linear up to 1 % and logarithmic beyond.
_TICKS = sorted({sign * n * 10**e for sign in (-1, 1) for n in (1, 2, 5) for e in range(5)} | {-0.5, -0.2, 0, 0.2, 0.5})


def pareto(comparisons: Comparison | Sequence[Comparison], path: str | os.PathLike[str]) -> None:
    """Draw perplexity and KL against true bits, or bytes, as PNG: a row of two pictures for each model and protocol."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    several = [comparisons] if isinstance(comparisons, Comparison) else list(comparisons)
    each = [(one, protocol) for one in several for protocol in dict.fromkeys(row.protocol for row in one.rows)]
    figure, axes = plt.subplots(len(each), 2, figsize=(10.5, 4.2 * len(each)), squeeze=False, layout="constrained")
    shown: dict[str, Any] = {}
    for pair, (one, protocol) in zip(axes, each, strict=True):
        rows = [row for row in one.rows if row.protocol == protocol and method(row.spec) != "exact"]
        rows = [row for row in rows if method(row.spec) != "window"] or rows
        for axis, what in zip(pair, ("perplexity", "KL"), strict=True):
            shown |= _draw(axis, rows, what)
            name = f"{_shorten(one.model, 40)}, " if len(several) > 1 else ""
            axis.set_title(f"{name}{protocol}: {what}", loc="left", fontsize=11)
    names = [name for name in STYLES if name in shown] + [name for name in shown if name not in STYLES]
    figure.legend([shown[n] for n in names], names, loc="outside lower center", ncols=min(4, max(1, len(names))), frameon=False)
    figure.suptitle("\n".join(map(_measured, several)), fontsize=11)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def _measured(one: Comparison) -> str:
    return f"{one.model}, {one.tokens:,} tokens of {_shorten(one.text)}, context {one.context:,}"


def _draw(axis: Any, rows: list[Row], what: str) -> dict[str, Any]:
    """Draw one panel. Returns the line of each method, or the point of each cache."""
    lines: dict[str, Any] = {}
    compressed = any(method(row.spec) != "window" for row in rows)
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        name, at = (method(row.spec), row.codec_bits) if compressed else (row.spec, row.nbytes / 2**20)
        points.setdefault(name, []).append((at, _value(row, what)))
    for number, (name, own) in enumerate(points.items()):
        colour, marker = STYLES.get(name, ("#444444", ".")) if compressed else list(STYLES.values())[number % len(STYLES)]
        x, y = zip(*sorted(own), strict=True)
        (lines[name],) = axis.plot(x, y, color=colour, marker=marker, ms=6 if compressed else 9, lw=1.2, label=name)
    axis.set_xlabel("true bits per element of the compressed tier" if compressed else "size of the cache of a sequence (MiB)")
    if what == "KL":
        axis.set_ylabel("KL to the exact cache (nats)")
        axis.set_yscale("log")
    else:
        axis.set_ylabel("change of perplexity (%)")
        axis.set_yscale("symlog", linthresh=1.0)
        axis.axhline(0, color="black", lw=0.8)
        from matplotlib.ticker import FuncFormatter, NullLocator

        low, high = axis.get_ylim()
        ticks = [tick for tick in _TICKS if low <= tick <= high]
        axis.set_yticks(ticks if len(ticks) > 3 else axis.get_yticks())
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
    axis.grid(alpha=0.25, which="both")
    return lines


def _value(row: Row, what: str) -> float:
    return max(row.kl, LEAST_KL) if what == "KL" else 100 * row.delta


def _shorten(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
