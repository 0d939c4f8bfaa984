"""What a Tensor Memory is: `TensorMemoryConfig`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from tessera.options import Options, check_whole

#: Least standard deviation of a write (the paper's).
SIGMA_LEAST = 1e-4
#: Numbers of h, and of c, in the state of a row at most: a gigabyte each.
MOST = 1 << 28
_WORDS = {
    "write": ("gaussian", "nearest"),
    "update": ("footprint", "all"),
    "coordinates": ("agree", "shared", "separate"),
    "read": ("token", "chunk"),
    "projection": ("light", "full"),
    "convolution": ("factorised", "pointwise"),
    "gates": ("state", "input"),
}


@dataclass(frozen=True)
class TensorMemoryConfig(Options):
    """A grid of cells of fixed size that tokens write to and read from at continuous places (arXiv 2605.27686).

    The defaults are this project's; `paper()` gives the paper's.
    """

    channels: int = 16
    """Numbers in a cell, C; the hidden h and the cell c have as many each."""
    grid: tuple[int, ...] = (6, 6, 6)
    """Cells along each of one, two or three axes: (width,), (height, width) or (depth, height, width)."""
    chunk: int = 1
    """Tokens that are written together, in one step of the recurrence. All of them read what was there before the step."""
    write: Literal["gaussian", "nearest"] = "gaussian"
    """How far a write reaches: a "gaussian" about its place, or the "nearest" cell alone, through which no gradient finds the
    place."""
    update: Literal["footprint", "all"] = "footprint"
    """Cells that a step changes: those in the "footprint" of the write, by its weight there, so that every other cell is kept
    exactly and costs nothing; or "all", written or not, as in the paper."""
    coordinates: Literal["agree", "shared", "separate"] = "agree"
    """Where a chunk is written. "agree": at the mean of the places that it reads, which for one token is the same place.
    "shared": where the net that gives the place of reads puts the projected chunk (the paper's). "separate": where a net of its
    own puts it."""
    read: Literal["token", "chunk"] = "token"
    """A read for each "token", or one for the "chunk", at the place of its first token."""
    projection: Literal["light", "full"] = "light"
    """What a chunk is projected to before it is written: a sum of its tokens with a weight for each place in the chunk and each
    feature, or the "full" matrix over all of them."""
    convolution: Literal["factorised", "pointwise"] = "factorised"
    """What the gates of a cell see: three cells along each axis in turn, or the cell itself only."""
    gates: Literal["state", "input"] = "state"
    """Gates are computed from what is written and the "state", or from the "input" alone: then the recurrence is linear and is
    computed for many steps at once."""
    forget_bias: float = 3.0
    """Bias of the forget gate at the start. At 0 a cell halves at every step that changes it."""
    sigma_init: float = 0.3
    """Standard deviation of a write at the start, on a grid from -1 to 1."""
    anchored: bool = False
    """Tokens come with their place, (x, y, z) from -1 to 1; what is learned is an offset, zero at the start."""
    every: int = 1
    """In a model of several layers, every how manyth gets a memory. All of them share its weights."""
    gate_init: float | None = None
    """Logit of each layer's gate at the start. None: 0, and what the memory gives out is zero, so that a model starts as what
    it was without one."""
    threaded: bool | None = None
    """Whether a layer goes on with the state that the layer before left, as in the paper, or has its own. None: it goes on in
    models that see everything at once. In a causal model it cannot: its first token would read what the last one wrote."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))
        if not 1 <= len(self.grid) <= 3:
            raise ValueError(f"grid has one, two or three axes, got {len(self.grid)}: {self.grid!r}")
        sizes = [("channels", self.channels), ("chunk", self.chunk), ("every", self.every)]
        sizes += [("each axis of grid", size) for size in self.grid]
        for name, value in sizes:
            check_whole(name, value, 1)
        if math.prod(self.grid) * self.channels > MOST:
            raise ValueError(
                f"a grid of {' x '.join(map(str, self.grid))} cells with {self.channels} channels holds more than {MOST} "
                "numbers for every row; take fewer"
            )
        self.check_words(_WORDS)
        for name, start in (("forget_bias", self.forget_bias), ("gate_init", self.gate_init)):
            if start is not None and not math.isfinite(start):
                raise ValueError(f"{name} must be finite, got {start!r}")
        if self.threaded not in (None, True, False):
            raise ValueError(f"threaded must be True, False or None, got {self.threaded!r}")
        if not math.isfinite(self.sigma_init) or self.sigma_init <= SIGMA_LEAST:
            raise ValueError(f"sigma_init must be more than {SIGMA_LEAST}, got {self.sigma_init!r}")

    @classmethod
    def paper(cls, **changes: Any) -> TensorMemoryConfig:
        """The paper's own setting, with `changes`."""
        setting: dict[str, Any] = {
            "update": "all",
            "coordinates": "shared",
            "read": "chunk",
            "projection": "full",
            "forget_bias": 0.0,
            "gate_init": -2.0,
            # A bias of 1 before the softplus.
            "sigma_init": math.log1p(math.e) + SIGMA_LEAST,
        }
        return cls(**{**setting, **changes})
