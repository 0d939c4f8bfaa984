"""Occlusion: a ball moves through frames and is hidden in some of them; the question is its quadrant.

`Occlusion.paper` is the original of arXiv 2605.27686: the middle frames are hidden, and the last frame, which shows the ball,
has the question, so that it can be answered from that frame. Otherwise the last frames are hidden: each of them asks for the
quadrant; or, when the ball is back, the question is whether it is where it should be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor
from torch.nn.functional import one_hot

from tessera.lab.tasks.associative_recall import IGNORED

#: Pixels along a side of a frame, and of a quadrant.
SIZE, HALF = 16, 8
#: All velocities, (8, 2), in pixels a frame.
VELOCITIES = torch.tensor([(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1) if (x, y) != (0, 0)])


@dataclass(frozen=True)
class Occlusion:
    """The task. The world has 16x16 pixels and wraps round; the ball has 2x2, and one of eight velocities.

    Attributes:
        frames: number of moving frames, the hidden ones included.
        hidden: number of frames that do not show the ball.
        hide: hidden frames are at the "end", or in the "middle" as in the original.
        ask: "hidden": the quadrant in each hidden frame; "back": in one more frame the ball is back, half of the time half a
            world away from where it should be, and asked is whether it is (see also `lesson`); "last": the quadrant in the
            last frame, as in the original.
        delay: blank frames before the hidden ones in which the world stands still.
        patch: pixels along a side of a token.
    """

    frames: int = 8
    hidden: int = 4
    hide: Literal["end", "middle"] = "end"
    ask: Literal["hidden", "back", "last"] = "hidden"
    delay: int = 0
    patch: int = 8

    def __post_init__(self) -> None:
        if self.hide not in ("end", "middle") or self.ask not in ("hidden", "back", "last"):
            raise ValueError(
                f"hide must be 'end' or 'middle' and ask 'hidden', 'back' or 'last'; got {self.hide!r} and {self.ask!r}"
            )
        if not 0 <= self.hidden < self.frames:
            raise ValueError(f"hidden must lie between 0 and less than the {self.frames} frames, got {self.hidden}")
        if self.hidden == 0 and self.ask == "hidden":
            raise ValueError("there are no hidden frames to ask in; set hidden, or ask='last'")
        if self.delay < 0:
            raise ValueError(f"delay must not be negative, got {self.delay}")
        if self.patch not in (1, 2, 4, 8, 16):
            raise ValueError(f"patch must be 1, 2, 4, 8 or 16, got {self.patch}")

    @classmethod
    def paper(cls, hidden: int = 4, **changes: Any) -> Occlusion:
        """Return the original task: eight frames, `hidden` of them in the middle."""
        return cls(**{"hidden": hidden, "hide": "middle", "ask": "last", **changes})

    @property
    def frame(self) -> int:
        """Tokens of a frame."""
        return (SIZE // self.patch) ** 2

    @property
    def features(self) -> int:
        """Number of features of a token: pixels, index of the patch, whether the world stands still."""
        return self.patch**2 + self.frame + 1

    @property
    def classes(self) -> int:
        """Number of possible answers: four quadrants; with "back" two more before them, as expected and not."""
        return 6 if self.ask == "back" else 4

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.frame * len(self._clock())

    @property
    def ceiling(self) -> float:
        """Accuracy of the best answer from everything seen so far."""
        return self.best(len(self._clock()))

    @property
    def stateless(self) -> float:
        """Accuracy of the best answer from the current frame."""
        return self.best(1)

    @property
    def chance(self) -> float:
        """Accuracy of the best answer from nothing."""
        return self.best(0)

    def best(self, frames: int) -> float:
        """Compute the accuracy of the best answer from the newest `frames` frames, by enumerating all worlds."""
        start = torch.cartesian_prod(torch.arange(SIZE), torch.arange(SIZE))
        shifts = self._shifts()
        world = torch.cartesian_prod(torch.arange(len(start)), torch.arange(len(VELOCITIES)), torch.arange(len(shifts)))
        places, quadrant = self._places(start[world[:, 0]], VELOCITIES[world[:, 1]], shifts[world[:, 2]])
        weight = torch.tensor([1.0] if len(shifts) == 1 else [3.0, 1.0, 1.0, 1.0], dtype=torch.float64)[world[:, 2]]
        answers = (world[:, 2:] > 0).long().expand_as(quadrant) if self.ask == "back" else quadrant
        visible, found = self._visible(), []
        for at in self._asked():
            known = [t for t in range(max(0, at + 1 - frames), at + 1) if visible[t]]
            codes = places[:, known, 0] * SIZE + places[:, known, 1]
            _, group = codes.unique(dim=0, return_inverse=True) if known else (None, torch.zeros(len(world), dtype=torch.long))
            counts = torch.zeros(int(group.max()) + 1, self.classes, dtype=torch.float64)
            counts.index_put_((group, answers[:, at]), weight, accumulate=True)
            found.append(float(counts.max(1).values.sum() / weight.sum()))
        return sum(found) / len(found)

    def sample(self, batch: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw clips: tokens, (batch, length, features), and targets, (batch, length) int64, at the last tokens of frames."""
        return self._draw(batch, generator, self._asked())

    def lesson(self, batch: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw training clips: as `sample`, with "back" also the quadrant in each hidden frame, as answers 2 to 5.

        Without these a clip has one bit of supervision, which depends on tracking the ball, so training gets little signal.
        """
        return self._draw(batch, generator, (self._hidden() if self.ask == "back" else []) + self._asked())

    def _draw(self, batch: int, generator: Generator | None, asked: list[int]) -> tuple[Tensor, Tensor]:
        start = torch.randint(SIZE, (batch, 2), generator=generator)
        velocity = VELOCITIES[torch.randint(len(VELOCITIES), (batch,), generator=generator)]
        shifts = self._shifts()
        moved = torch.randint(1, 4, (batch,), generator=generator) * torch.randint(2, (batch,), generator=generator)
        moved = moved % len(shifts)
        places, answers = self._places(start, velocity, shifts[moved])
        steps = places.shape[1]
        ball = one_hot(places, SIZE).float()
        ball = (ball + ball.roll(1, -1)) * self._visible()[:, None, None]
        # Rows are y, columns x.
        picture = ball[:, :, 1, :, None] * ball[:, :, 0, None, :]
        side, patch = SIZE // self.patch, self.patch
        cut = picture.view(batch, steps, side, patch, side, patch).transpose(3, 4).reshape(batch, steps, self.frame, patch**2)
        still = torch.tensor(self._clock()).diff(prepend=torch.tensor([-1])) == 0
        which = torch.eye(self.frame).expand(batch, steps, -1, -1)
        tokens = torch.cat((cut, which, still[:, None, None].float().expand(batch, -1, self.frame, 1)), dim=-1)
        if self.ask == "back":
            answers = answers + 2
            answers[:, -1] = moved > 0
        targets = torch.full((batch, steps, self.frame), IGNORED)
        targets[:, asked, -1] = answers[:, asked]
        return tokens.flatten(1, 2), targets.flatten(1)

    def _clock(self) -> list[int]:
        """Return the time of the world in each frame."""
        before = self._before()
        after = self.frames - before + (self.ask == "back")
        return [*range(before), *[before - 1] * self.delay, *range(before, before + after)]

    def _before(self) -> int:
        """Return the number of frames before the first without the ball."""
        shown = self.frames - self.hidden
        return shown if self.hide == "end" else shown // 2

    def _visible(self) -> Tensor:
        """Return whether each frame shows the ball, (frames,) bool."""
        before = self._before()
        shown = torch.ones(len(self._clock()), dtype=torch.bool)
        shown[before : before + self.delay + self.hidden] = False
        return shown

    def _asked(self) -> list[int]:
        """Return the frames with a question."""
        return self._hidden() if self.ask == "hidden" else [len(self._clock()) - 1]

    def _hidden(self) -> list[int]:
        """Return the frames in which the ball is hidden."""
        first = self._before() + self.delay
        return list(range(first, first + self.hidden))

    def _shifts(self) -> Tensor:
        """Return the offsets of the ball when it is back, from its expected place."""
        return torch.cartesian_prod(torch.tensor([0, HALF]), torch.tensor([0, HALF]))[: 4 if self.ask == "back" else 1]

    def _places(self, start: Tensor, velocity: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Compute places, (batch, frames, 2), of the ball's first pixel, x and y; and their quadrants, (batch, frames)."""
        clock = torch.tensor(self._clock())
        places = start[:, None] + velocity[:, None] * clock[:, None]
        places[:, -1] += shift
        places %= SIZE
        return places, (places[..., 0] >= HALF) + 2 * (places[..., 1] >= HALF).long()
