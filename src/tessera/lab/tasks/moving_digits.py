"""Clips of two handwritten digits that move, bounce off the border and pass behind a bar: name the one that is hidden now.

A frame in which a digit is hidden shows the bar and the other digit, so that what is asked lies in earlier frames alone. It is
asked only if the digit has been seen completely and apart from the other before, so that the best accuracy is 1. The digits of
a clip differ, so after seeing the other one a guess is among nine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from tessera.lab.tasks.pictures import Pictures, load_digits

#: Target of a frame in which nothing is asked.
IGNORED = -100

#: Number of clips that a model is measured on.
TESTED = 256

#: Pixel value of the bar.
BAR = 0.5


@dataclass(frozen=True, eq=False)
class MovingDigits:
    """The task.

    Attributes:
        frames: number of frames of a clip.
        size: pixels along each side of a frame.
        bar: number of columns in the middle behind which digits pass.
        patch: side of the patches that frames are made for.
        step: places and moves of digits are multiples of so many pixels. If it is the size of a patch and a digit, every digit
            is one patch; with 1 digits must be recognised at all offsets, which takes a small model far longer to learn.
        stay: number of frames for which a digit stays in a place completely behind the bar.
        alone: share of the training clips with one digit, which is asked for in every frame from the first that shows it
            completely: the model learns to recognise digits from these. No model is measured on them.
        pictures: pictures of digits; scikit-learn's unless given.
    """

    frames: int = 16
    size: int = 32
    bar: int = 16
    patch: int = 8
    step: int = 8
    stay: int = 1
    alone: float = 0.5
    pictures: Pictures = field(default_factory=load_digits)

    def __post_init__(self) -> None:
        digit = self.digit
        if self.frames < 2:
            raise ValueError(f"a clip needs two frames at least, got {self.frames}")
        if self.bar < digit:
            raise ValueError(f"a bar of {self.bar} columns hides no digit, which has {digit}")
        if (self.size - self.bar) // 2 < digit:
            raise ValueError(
                f"beside a bar of {self.bar} columns frames of {self.size} have no room for a digit, which has {digit}"
            )
        columns = self._columns(torch.arange(0, self.size - digit + 1, self.step)) if self.step > 0 else ()
        if not all(bool(where.any()) for where in columns) or not columns:
            raise ValueError(f"with step {self.step} no digit comes to be whole behind the bar, and beside it; choose another")
        if self.stay < 1:
            raise ValueError(f"a digit stays for one frame at least, got {self.stay}")
        if not 0 <= self.alone < 1:
            raise ValueError(f"alone is a share from 0 to less than 1, got {self.alone}")
        if self.patch < 1 or self.size % self.patch:
            raise ValueError(f"patch {self.patch} does not divide frames of {self.size} pixels a side")
        object.__setattr__(self, "_parts", self.pictures.split())

    @property
    def digit(self) -> int:
        """Pixels along a side of a digit."""
        return self.pictures.pixels.shape[-1]

    @property
    def edges(self) -> tuple[int, int]:
        """First column of the bar, and the first after it."""
        start = (self.size - self.bar) // 2
        return start, start + self.bar

    @property
    def chance(self) -> float:
        """Accuracy of guessing, the other digit seen."""
        return 1 / (len(self.pictures.names) - 1)

    @property
    def ceiling(self) -> float:
        """Accuracy of the best answer."""
        return 1.0

    def sample(self, batch: int, generator: Generator | None = None, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Draw clips, (batch, frames, 1, size, size), and hidden digits, (batch, frames) int64, `IGNORED` where not asked."""
        pixels, labels, places = self.draw(batch, generator, held_out)
        targets = self.targets(labels, places)
        if not held_out and (single := round(self.alone * batch)):
            pixels[:single, 1] = 0
            known = self._columns(places[:single, :, 0, 0])[1].int().cumsum(1) > 0
            targets[:single] = torch.where(known, labels[:single, :1], IGNORED)
        return self.render(pixels, places), targets

    def draw(self, batch: int, generator: Generator | None = None, held_out: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Draw digits (batch, 2, digit, digit), labels (batch, 2), and places, (batch, frames, 2, (x, y)) of the corner."""
        parts: tuple[Pictures, Pictures] = self._parts  # type: ignore[attr-defined]
        own = parts[held_out]

        def integers(limit: int, *shape: int) -> Tensor:
            return torch.randint(limit, shape, generator=generator)

        # The second digit is drawn among those with another label.
        first = integers(len(own.labels), batch)
        others = torch.rand((batch, len(own.labels)), generator=generator)
        second = others.masked_fill(own.labels == own.labels[first].unsqueeze(1), -1).argmax(1)
        rows = torch.stack((first, second), dim=1)
        room = (self.size - self.digit) // self.step * self.step
        start = self.step * integers(room // self.step + 1, batch, 2, 2)
        across = (1 + integers(2, batch, 2)) * (2 * integers(2, batch, 2) - 1)
        speed = self.step * torch.stack((across, integers(5, batch, 2) - 2), dim=-1)
        way = start.unsqueeze(1) + speed.unsqueeze(1) * torch.arange(self.frames).view(1, -1, 1, 1)
        # Reflection at the border: a triangle wave between 0 and `room`.
        places = room - (way % (2 * room) - room).abs()
        if self.stay > 1:
            frames = 1 + (self.stay - 1) * self._columns(places[..., 0])[0].int()
            left = frames.cumsum(1).transpose(1, 2).contiguous()  # frame at which each place is left, by digit
            now = torch.searchsorted(left, torch.arange(self.frames).expand(batch, 2, -1).contiguous(), right=True)
            places = places.gather(1, now.transpose(1, 2).unsqueeze(-1).expand_as(places))
        return own.pixels[rows, 0], own.labels[rows], places

    def render(self, pixels: Tensor, places: Tensor) -> Tensor:
        """Render frames, (batch, frames, 1, size, size)."""
        batch, frames = places.shape[:2]
        clip = torch.zeros((batch, frames, self.size, self.size))
        span = torch.arange(self.digit)
        at = torch.arange(batch).view(-1, 1, 1, 1), torch.arange(frames).view(1, -1, 1, 1)
        for which in range(2):
            x, y = places[:, :, which].unbind(-1)
            where = (*at, (y[..., None] + span)[..., :, None], (x[..., None] + span)[..., None, :])
            clip[where] = torch.maximum(clip[where], pixels[:, which].unsqueeze(1))
        clip[..., self.edges[0] : self.edges[1]] = BAR
        return clip.unsqueeze(2)

    def targets(self, labels: Tensor, places: Tensor) -> Tensor:
        """Return the target of each frame, (batch, frames)."""
        hidden, seen = self._columns(places[..., 0])
        overlap = ((places[:, :, 0] - places[:, :, 1]).abs() < self.digit).all(-1)
        known = (seen & ~overlap.unsqueeze(-1)).int().cumsum(1) > 0
        alone = hidden & ~hidden.flip(-1) & known
        label = (labels.unsqueeze(1) * alone).sum(-1)
        return torch.where(alone.any(-1), label, IGNORED)

    def _columns(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return whether digits with first columns x are completely behind the bar, and completely beside it."""
        left, right = self.edges
        return (x >= left) & (x + self.digit <= right), (x + self.digit <= left) | (x >= right)

    def test(self) -> tuple[Tensor, Tensor]:
        """Return `TESTED` clips of held-out digits and their targets, always the same."""
        return self.sample(TESTED, Generator().manual_seed(0), held_out=True)

    def score(self, output: Tensor, targets: Tensor) -> float:
        """Compute the share of right answers. output: (batch, frames, labels)."""
        asked = targets != IGNORED
        return float((output.argmax(-1) == targets)[asked].float().mean())

    @property
    def about(self) -> dict[str, Any]:
        """Return the task as a dictionary for JSON."""
        shape = {name: getattr(self, name) for name in ("frames", "size", "bar", "patch", "step", "stay", "alone")}
        return {"task": "moving digits", **shape, "pictures": len(self.pictures.labels)}
