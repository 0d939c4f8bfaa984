"""The picture of a run on pictures or clips: its loss, and the model's output for some held-out ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.files import atomic_path
from tessera.lab.models.vit import to_patches
from tessera.lab.training.log import read_log

#: Number of pictures, or frames, that are shown.
SHOWN = 8


def plot_vision(log: Path, target: Path, task: Any, pixels: Tensor, targets: Tensor, said: Tensor) -> None:
    """Draw a run as a PNG.

    Args:
        log: ``log.jsonl`` of the run.
        target: the PNG.
        task, pixels, targets, said: see `tessera.lab.training.vision`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = _rows(task, pixels, targets, said)
    figure = plt.figure(figsize=(10, 2.6 + 1.4 * len(rows)), layout="constrained")
    grid = figure.add_gridspec(len(rows) + 1, SHOWN, height_ratios=[2.2, *[1.4] * len(rows)])
    axes = figure.add_subplot(grid[0, :])
    steps = [record for record in read_log(log) if "loss" in record]
    axes.plot([r["step"] for r in steps], [r["loss"] for r in steps])
    axes.set(xlabel="step", ylabel="loss", title=f"score {task.score(said, targets):.3f} (chance {task.chance:.3f})")
    axes.grid(alpha=0.25)
    for row, shown in enumerate(rows, start=1):
        for column, (title, picture) in enumerate(shown):
            cell = figure.add_subplot(grid[row, column])
            cell.imshow(picture.movedim(0, -1).clamp(0, 1).squeeze(-1), cmap="gray", vmin=0, vmax=1)
            cell.set_title(title, fontsize=8)
            cell.axis("off")
    with atomic_path(target) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def _rows(task: Any, pixels: Tensor, targets: Tensor, said: Tensor) -> list[list[tuple[str, Tensor]]]:
    """Rows of pictures, (channels, size, size), with titles."""
    names = task.pictures.names
    if targets.is_floating_point():
        own = to_patches(pixels, task.patch)[:SHOWN]
        hidden = (targets != -100)[:SHOWN]
        given, filled = own.masked_fill(hidden, 0.5), torch.where(hidden, said[:SHOWN], own)
        rows = (("given", given), ("filled in", filled), ("true", own))
        shape = pixels.shape[1:]
        return [[(title, _whole(x, task.patch, shape)) for x in patches] for title, patches in rows]
    if pixels.ndim == 4:
        best = said.argmax(-1)
        return [[(f"{names[int(best[i])]} ({names[int(targets[i])]})", pixels[i]) for i in range(min(SHOWN, len(pixels)))]]
    asked = targets != -100
    clip = int(asked.sum(1).argmax())
    frames = torch.linspace(0, pixels.shape[1] - 1, min(SHOWN, pixels.shape[1])).round().long().tolist()
    best = said[clip].argmax(-1)
    shown = []
    for t in frames:
        words = f"{names[int(best[t])]} ({names[int(targets[clip, t])]})" if asked[clip, t] else ""
        shown.append((f"{t}: {words}", pixels[clip, t]))
    return [shown]


def _whole(patches: Tensor, size: int, shape: torch.Size) -> Tensor:
    """Inverse of `to_patches` for one picture of this shape."""
    channels, height, width = shape
    cut = patches.view(height // size, width // size, channels, size, size)
    return cut.permute(2, 0, 3, 1, 4).reshape(shape)
