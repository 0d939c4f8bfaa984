"""Draw the tiers that a token passes through as it ages, and what a query reads of each.

Writes docs/images/token_life.svg. Sizes are bits per element of a key or a value, as the codec has them.

Example:

    python docs/token_life.py
    python docs/token_life.py --out life.png     # to look at it
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parent / "images" / "token_life.svg"
#: Wong's colour-blind safe palette, lightened behind text.
EXACT, PACKED, MATRIX, LINE = "#BFE0F5", "#FCE0A6", "#CFE9DF", "#222222"
READ, MOVE = "#0072B2", "#D55E00"
#: Size of the picture in inches, at 100 dots per inch.
SIZE = (8.4, 4.5)


def box(axes: Any, left: float, bottom: float, width: float, height: float, colour: str, title: str, words: str) -> None:
    """Draw the box of a tier."""
    from matplotlib.patches import FancyBboxPatch

    shape = FancyBboxPatch((left, bottom), width, height, "round,pad=0,rounding_size=0.08", fc=colour, ec=LINE, lw=1)
    axes.add_patch(shape)
    axes.text(left + width / 2, bottom + height - 0.2, title, ha="center", va="center", fontsize=10.5, weight="bold")
    axes.text(left + width / 2, bottom + height / 2 - 0.14, words, ha="center", va="center", fontsize=9, linespacing=1.35)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], colour: str, style: str = "-") -> None:
    """Draw an arrow between two points."""
    how = {"arrowstyle": "-|>,head_width=0.22,head_length=0.4", "color": colour, "lw": 1.6, "ls": style}
    axes.annotate("", end, start, arrowprops={**how, "shrinkA": 0, "shrinkB": 0})


def draw(path: Path) -> None:
    """Draw the picture; the suffix of the file decides its format."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "tessera"
    matplotlib.rcParams["font.family"] = "DejaVu Sans"
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=SIZE, dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, SIZE[0]), ylim=(0, SIZE[1]))
    axes.axis("off")
    axes.text(0.2, 4.27, "sink:4 + hqmq:4@32768 + recent:128 + tc", fontsize=10.5, family="DejaVu Sans Mono", va="center")
    axes.text(8.2, 4.27, "time: a token moves to the left as it ages", fontsize=9, ha="right", va="center", color=MOVE)
    low, high = 2.05, 1.45
    box(axes, 0.2, low, 1.15, high, EXACT, "sink", "the first\n4 tokens,\nalways exact")
    box(axes, 1.75, low, 1.7, high, MATRIX, "tc", "written into a\nd × d matrix\nfor each head,\nof fixed size")
    packed = "packed in blocks\nof 64 tokens,\n4 + 8/d bits per number,\nkeys ¼ bit more"
    box(axes, 3.85, low, 2.0, high, PACKED, "hqmq:4", packed)
    box(axes, 6.25, low, 1.15, high, EXACT, "recent", "the newest\n128 tokens,\nexact")
    middle = low + high / 2
    arrow(axes, (8.2, middle), (7.4, middle), MOVE)
    axes.text(7.82, middle + 0.12, "new", ha="center", va="bottom", fontsize=9, color=MOVE)
    for left, right in ((5.85, 6.25), (3.45, 3.85)):
        arrow(axes, (right, middle), (left, middle), MOVE)
    top = low + high
    axes.text(6.05, top + 0.1, "after 128 tokens: quantise", ha="center", va="bottom", fontsize=9, color=MOVE)
    axes.text(3.3, top + 0.1, "after 32,768: write, or drop", ha="center", va="bottom", fontsize=9, color=MOVE)

    bottom = 1.42
    for x in (0.775, 4.85, 6.825):
        axes.plot([x, x], [low, bottom], color=READ, lw=1.6)
    axes.plot([0.775, 6.825], [bottom, bottom], color=READ, lw=1.6)
    arrow(axes, (5.6, bottom), (5.6, 0.85), READ)
    axes.text(5.72, 1.13, "one softmax over all of them,\nmerged by log-sum-exp", fontsize=9, va="center", color=READ)
    axes.plot([2.6, 2.6], [low, bottom + 0.1], color=READ, lw=1.6, ls=(0, (4, 2)))
    axes.plot([2.6, 2.6], [bottom - 0.1, 0.6], color=READ, lw=1.6, ls=(0, (4, 2)))
    arrow(axes, (2.6, 0.6), (3.75, 0.6), READ)
    axes.text(2.72, 1.13, "a linear read,\nadded through a gate", fontsize=9, va="center", color=READ)
    box_words = "output of the attention layer; no dense copy is ever made"
    from matplotlib.patches import FancyBboxPatch

    shape = FancyBboxPatch((3.75, 0.3), 4.4, 0.55, "round,pad=0,rounding_size=0.08", fc="#F2F2F2", ec=LINE, lw=1)
    axes.add_patch(shape)
    axes.text(5.95, 0.575, box_words, ha="center", va="center", fontsize=9.5)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, facecolor="white")
    plt.close(figure)


def main() -> None:
    """Draw the picture from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    draw(parser.parse_args().out)


if __name__ == "__main__":
    main()
