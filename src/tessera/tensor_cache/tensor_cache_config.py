"""The configuration of a Tensor Cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from tessera.options import Options, check_whole

Rule = Literal["outer", "delta", "wedge"]
Order = Literal["write_first", "read_first"]
Source = Literal["head", "token"]
GateKind = Literal["layer", "token"]

_WORDS = {
    "rule": ("outer", "delta", "wedge"),
    "order": ("write_first", "read_first"),
    "rates": ("head", "token"),
    "gate": ("layer", "token"),
    "write": ("pairs", "chunk_means"),
}


@dataclass(frozen=True)
class TensorCacheConfig(Options):
    """A window of exact attention and, behind it, a matrix per head that absorbs what leaves (arXiv 2605.22884).

    The defaults are this project's; `paper()` gives the paper's.
    """

    window: int = 512
    """Number of newest tokens that attention sees, the query's own included."""
    sink: int = 4
    """Number of first tokens that attention always sees; they are never written."""
    rule: Rule = "delta"
    """The update of A for a pair (k, v): "outer" k ⊗ v; "delta" k ⊗ (v - kA); "wedge" k ⊗ v - v ⊗ k."""
    decay: float | tuple[float, float] = (100.0, 100_000.0)
    """Initial factor of A at every write: one number, or the shortest and the longest half-life of the heads, in tokens."""
    write_rate: float = 0.5
    """Initial factor of every write."""
    rates: Source = "head"
    """Whether decay and write rate are learned per "head", or computed from the pair that leaves ("token")."""
    order: Order = "write_first"
    """Order within a step.

    With "write_first" a read includes the pair that left at its own step, so that every pair is in exactly one of window,
    sinks and A. With "read_first", the paper's, that pair is in none of them for one step.
    """
    normalise_keys: bool = True
    """Whether keys are normalised to length 1 before they are written."""
    normalise_queries: bool = True
    """Whether queries are normalised to length 1 before they read."""
    value_scale: float = 1.0
    """Factor of values before they are written."""
    normalise_read: bool = False
    """Whether a read is divided by max(|q·z|, 1), where z sums the keys as A sums the pairs."""
    slow: tuple[float, float] | None = None
    """Decay and write rate of a second matrix, mixed in by a learned share; None: there is no second matrix."""
    slots: int = 1
    """Number of matrices per head; each pair is written into one of them."""
    top_k: int = 1
    """Number of slots that a query reads."""
    slot_noise: float = 0.0
    """Scale of the Gumbel noise of routing to slots in training. The paper's 1 applies at inference too."""
    rotary: bool = False
    """Whether keys and queries keep their rotary phase in the memory; if not, it is removed first."""
    gate: GateKind = "layer"
    """The gate of the read: one number per "layer", or one per "token", computed from its query."""
    gate_init: float = -2.0
    """Initial logit of the gate."""
    layers: tuple[int, ...] | None = None
    """Layers that get a memory, negative ones counted from the last; None: all."""
    chunk: int = 64
    """Number of tokens computed together in training and prefill; affects speed, not the result."""
    write: Literal["pairs", "chunk_means"] = "pairs"
    """What is written: "pairs", each pair by itself, or "chunk_means", a chunk's mean key with its mean value.

    The second is a shortcut that adds C² - C wrong products per chunk, and is there only to measure their cost.
    """

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("sink", 0), ("slots", 1), ("top_k", 1), ("chunk", 1)):
            check_whole(name, getattr(self, name), least)
        self.check_words(_WORDS)
        if self.top_k > self.slots:
            raise ValueError(f"top_k {self.top_k} is more than there are slots, {self.slots}")
        if isinstance(self.decay, (int, float)):
            _open_unit("decay", self.decay)
        else:
            object.__setattr__(self, "decay", tuple(self.decay))
            if len(self.decay) != 2 or not 0 < self.decay[0] <= self.decay[1] < math.inf:
                raise ValueError(f"decay takes one factor or a shortest and a longest half-life, got {self.decay!r}")
        _open_unit("write_rate", self.write_rate)
        if self.slow is not None:
            object.__setattr__(self, "slow", tuple(self.slow))
            if len(self.slow) != 2:
                raise ValueError(f"slow takes a decay and a write rate, got {self.slow!r}")
            _open_unit("slow decay", self.slow[0])
            _open_unit("slow write rate", self.slow[1])
        if not math.isfinite(self.value_scale) or self.value_scale <= 0:
            raise ValueError(f"value_scale must be positive, got {self.value_scale!r}")
        if not 0 <= self.slot_noise < math.inf:
            raise ValueError(f"slot_noise must be finite and not negative, got {self.slot_noise!r}")
        if self.rule == "delta" and not self.normalise_keys:
            raise ValueError("rule 'delta' is stable for keys of length 1 at most; set normalise_keys, or take rule 'outer'")
        if self.write == "chunk_means" and self.rule != "outer":
            raise ValueError("write 'chunk_means' is there to be compared with rule 'outer'")
        if not math.isfinite(self.gate_init):
            raise ValueError(f"gate_init must be finite, got {self.gate_init!r}")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
            if not self.layers:
                raise ValueError("layers names none; leave it out for all of them")
            if any(not isinstance(i, int) or isinstance(i, bool) for i in self.layers):
                raise ValueError(f"layers holds whole numbers, got {self.layers!r}")

    @classmethod
    def paper(cls, **changes: Any) -> TensorCacheConfig:
        """The paper's own setting, with `changes`."""
        setting: dict[str, Any] = {
            "sink": 0,
            "rule": "delta",
            "decay": 0.995,
            "write_rate": 0.05,
            "order": "read_first",
            "normalise_queries": False,
            "rotary": True,
        }
        return cls(**{**setting, **changes})

    def decays(self, heads: int) -> list[float]:
        """Return each head's initial decay."""
        if isinstance(self.decay, (int, float)):
            return [float(self.decay)] * heads
        short, long = self.decay
        steps = [i / max(1, heads - 1) for i in range(heads)]
        return [0.5 ** (1 / (short ** (1 - s) * long**s)) for s in steps]


def _open_unit(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie between 0 and 1, got {value!r}")
