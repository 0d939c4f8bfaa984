"""Classification of the user's own clips, at their last frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from tessera.lab.tasks.moving_digits import IGNORED
from tessera.lab.tasks.pictures import Pictures


@dataclass(frozen=True, eq=False)
class Clips:
    """The task.

    Attributes:
        pictures: the clips; see `tessera.lab.tasks.pictures.read_clips`.
        patch: side of the patches that frames are made for.
    """

    pictures: Pictures
    patch: int = 8

    def __post_init__(self) -> None:
        if self.pictures.pixels.ndim != 5:
            raise ValueError(f"clips are (n, frames, channels, size, size), got {tuple(self.pictures.pixels.shape)}")
        if self.patch < 1 or self.size % self.patch:
            raise ValueError(f"patch {self.patch} does not divide frames of {self.size} pixels a side")
        object.__setattr__(self, "_parts", self.pictures.split())

    @property
    def size(self) -> int:
        """Pixels along each side of a frame."""
        return self.pictures.pixels.shape[-1]

    @property
    def frames(self) -> int:
        """Number of frames of a clip."""
        return self.pictures.pixels.shape[1]

    @property
    def chance(self) -> float:
        """Accuracy of always answering the most common label."""
        labels = self._part(True).labels
        return float(labels.bincount().max() / len(labels))

    @property
    def ceiling(self) -> float:
        """Accuracy of the best answer."""
        return 1.0

    @property
    def about(self) -> dict[str, Any]:
        """Return the task as a dictionary for JSON."""
        shape = {"frames": self.frames, "size": self.size, "patch": self.patch, "labels": self.pictures.names}
        return {"task": "clips", **shape, "pictures": len(self.pictures.labels)}

    def sample(self, batch: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw clips for training and labels, (batch, frames) int64, `IGNORED` except in the last frame."""
        own = self._part(False)
        rows = torch.randint(len(own.labels), (batch,), generator=generator)
        return own.pixels[rows], self._targets(own.labels[rows])

    def test(self) -> tuple[Tensor, Tensor]:
        """Return all held-out clips and their labels."""
        own = self._part(True)
        return own.pixels, self._targets(own.labels)

    def score(self, output: Tensor, targets: Tensor) -> float:
        """Compute the share of clips with the right label. output: (n, frames, labels)."""
        return float((output[:, -1].argmax(-1) == targets[:, -1]).float().mean())

    def _targets(self, labels: Tensor) -> Tensor:
        targets = torch.full((len(labels), self.frames), IGNORED)
        targets[:, -1] = labels
        return targets

    def _part(self, held_out: bool) -> Pictures:
        parts: tuple[Pictures, Pictures] = self._parts  # type: ignore[attr-defined]
        return parts[held_out]
