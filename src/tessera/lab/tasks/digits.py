"""Pictures to be classified, or whose hidden patches are to be filled in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from tessera.lab.models.vit import to_patches
from tessera.lab.tasks.pictures import Pictures, load_digits

#: Target where nothing is asked. No pixel has this value.
IGNORED = -100


@dataclass(frozen=True, eq=False)
class Digits:
    """The task.

    Attributes:
        ask: the target: the "label" of a picture, or the "pixels" of its hidden patches.
        hidden: share of the patches that are hidden, for "pixels".
        patch: side of a patch.
        pictures: to draw from; scikit-learn's digits unless given.
    """

    ask: Literal["label", "pixels"] = "label"
    hidden: float = 0.5
    patch: int = 2
    pictures: Pictures = field(default_factory=load_digits)

    def __post_init__(self) -> None:
        if self.ask not in ("label", "pixels"):
            raise ValueError(f"ask must be 'label' or 'pixels', got {self.ask!r}")
        if self.patch < 1 or self.size % self.patch:
            raise ValueError(f"patch {self.patch} does not divide pictures of {self.size} pixels a side")
        if not 1 <= self.count < self.patches:
            raise ValueError(
                f"hidden={self.hidden} hides {self.count} of {self.patches} patches; one must be hidden and one seen"
            )
        if self.ask == "label" and len(self.pictures.names) < 2:
            raise ValueError(f"all pictures have the label {self.pictures.names[0]!r}; there is nothing to tell apart")
        object.__setattr__(self, "_parts", self.pictures.split())

    @property
    def size(self) -> int:
        """Pixels along a side."""
        return self.pictures.pixels.shape[-1]

    @property
    def patches(self) -> int:
        """Number of patches of a picture."""
        return (self.size // self.patch) ** 2

    @property
    def count(self) -> int:
        """Number of hidden patches."""
        return round(self.hidden * self.patches)

    @property
    def chance(self) -> float:
        """Score of guessing: always the most common label, or the mean of each pixel."""
        if self.ask == "pixels":
            return 0.0
        labels = self.part(True).labels
        return float(labels.bincount().max() / len(labels))

    @property
    def ceiling(self) -> float:
        """Score of the best answer."""
        return 1.0

    @property
    def about(self) -> dict[str, Any]:
        """Return the task as a dictionary for JSON."""
        shape = {"ask": self.ask, "hidden": self.hidden, "patch": self.patch, "size": self.size}
        return {"task": "pictures", **shape, "pictures": len(self.pictures.labels)}

    def part(self, held_out: bool) -> Pictures:
        """Return the held-out pictures, or those for training."""
        parts: tuple[Pictures, Pictures] = self._parts  # type: ignore[attr-defined]
        return parts[held_out]

    def sample(self, batch: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw pictures for training, (batch, channels, size, size), and targets; see `targets`."""
        own = self.part(False)
        rows = torch.randint(len(own.labels), (batch,), generator=generator)
        return own.pixels[rows], self.targets(own, rows, generator)

    def test(self) -> tuple[Tensor, Tensor]:
        """Return all held-out pictures and targets, always the same."""
        own = self.part(True)
        return own.pixels, self.targets(own, torch.arange(len(own.labels)), Generator().manual_seed(0))

    def targets(self, own: Pictures, rows: Tensor, generator: Generator | None = None) -> Tensor:
        """Return labels, (n,); or pixels, (n, patches, pixels of a patch), `IGNORED` where the patch is not hidden."""
        if self.ask == "label":
            return own.labels[rows]
        patches = to_patches(own.pixels[rows], self.patch)
        seen = torch.rand(patches.shape[:2], generator=generator).argsort(1) >= self.count
        return patches.masked_fill(seen.unsqueeze(-1), IGNORED)

    def score(self, output: Tensor, targets: Tensor) -> float:
        """Compute the share of right labels; or the share of the variance of hidden pixels that is recovered.

        Args:
            output: (n, labels), or (n, patches, pixels of a patch).
            targets: see `targets`.
        """
        if self.ask == "label":
            return float((output.argmax(-1) == targets).float().mean())
        mean = to_patches(self.part(False).pixels.mean(0, keepdim=True), self.patch)
        asked = targets != IGNORED
        wrong = (output - targets)[asked].square().sum()
        return float(1 - wrong / (mean.to(targets.device) - targets)[asked].square().sum())
