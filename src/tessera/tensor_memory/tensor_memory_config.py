"""The configuration of a Tensor Memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from tessera.options import Options, check_whole

#: Smallest standard deviation of a write (the paper's).
SIGMA_LEAST = 1e-4
#: Maximum number of elements of h, and of c, in the state of a row: a gigabyte each.
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
    """Number of channels of a cell, C; the hidden h and the cell c have as many each."""
    grid: tuple[int, ...] = (6, 6, 6)
    """Number of cells along each of one, two or three axes: (width,), (height, width) or (depth, height, width)."""
    chunk: int = 1
    """Number of tokens that are written together, in one step of the recurrence. All of them read the state before the step."""
    write: Literal["gaussian", "nearest"] = "gaussian"
    """Extent of a write: a "gaussian" around its place, or only the "nearest" cell, without a gradient to the place."""
    update: Literal["footprint", "all"] = "footprint"
    """Cells that a step changes: the "footprint" of the write, weighted, or "all", written or not, as in the paper.

    With "footprint" every other cell is kept exactly and costs nothing.
    """
    coordinates: Literal["agree", "shared", "separate"] = "agree"
    """Place of a chunk's write.

    "agree": the mean of the places that the chunk reads, for one token the same place. "shared", the paper's: the output of
    the net for places of reads on the projected chunk. "separate": the output of a net of its own.
    """
    read: Literal["token", "chunk"] = "token"
    """Whether there is a read for each "token", or one for the "chunk", at the place of its first token."""
    projection: Literal["light", "full"] = "light"
    """Projection of a chunk before it is written: "light", a sum of its tokens with a weight for each place in the chunk and
    each feature, or "full", a matrix over all of them.
    """
    convolution: Literal["factorised", "pointwise"] = "factorised"
    """The inputs of a cell's gates: three cells along each axis in turn, or only the cell itself."""
    gates: Literal["state", "input"] = "state"
    """Input of the gates besides the write: the "state", or nothing ("input").

    With "input" the recurrence is linear, and many steps are computed at once.
    """
    forget_bias: float = 3.0
    """Initial bias of the forget gate. At 0 a cell halves at every step that changes it."""
    sigma_init: float = 0.3
    """Initial standard deviation of a write, on a grid from -1 to 1."""
    anchored: bool = False
    """Whether tokens come with their place, (x, y, z) from -1 to 1; then an offset is learned, zero at the start."""
    every: int = 1
    """Distance between layers with a memory: every n-th layer gets one. All of them share its weights."""
    gate_init: float | None = None
    """Initial logit of each layer's gate.

    None: 0, with a memory whose output is zero, so that a model starts as what it was without one.
    """
    threaded: bool | None = None
    """Whether a layer continues the state of the layer before, as in the paper, or has its own.

    None: it does in non-causal models. In a causal model it cannot: its first token would read what the last one wrote.
    """

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
