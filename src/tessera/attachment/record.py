"""`Attachment`: what was done to a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from tessera.cache.layer import ATTACHED
from tessera.wrapped import unwrap

#: Numbers of each weight that a sample takes.
SAMPLED = 4


@dataclass
class Attachment:
    """What `attach` did to a model, so that it can be undone.

    Attributes:
        config: of the memory, a `TensorCacheConfig` or a `TensorMemoryConfig`.
        shape: what the memory must know of its model, as JSON has it.
        layers: what was added to each layer of the model, by its index.
        shared: what was added for all layers, or None.
        hooks: on the model's modules.
        frozen: parameters that learned before, and shall again.
        limited: attention modules that were given a window without a memory, each with the limits that it had before, or None.
        enabled: whether the model's attention was switched.
    """

    config: Any
    shape: dict[str, Any]
    layers: dict[int, Any] = field(default_factory=dict)
    shared: nn.Module | None = None
    hooks: list[RemovableHandle] = field(default_factory=list)
    frozen: list[nn.Parameter] = field(default_factory=list)
    limited: list[tuple[nn.Module, Any]] = field(default_factory=list)
    enabled: bool = False

    @property
    def kind(self) -> str:
        """ "TensorCache" or "TensorMemory"."""
        return type(self.config).__name__.removesuffix("Config")

    def modules(self) -> dict[str, nn.Module]:
        """All that was added, by the name that it has in a file."""
        named: dict[str, nn.Module] = {str(index): layer for index, layer in self.layers.items()}
        return named if self.shared is None else {"shared": self.shared, **named}


def sampled(model: nn.Module) -> dict[str, list[float]]:
    """A few numbers of every weight that a model has of itself, by name: what tells it from others of its shape."""
    done = attachment(model)
    added = () if done is None else {id(p) for module in done.modules().values() for p in module.parameters()}
    found = {}
    for name, p in model.named_parameters():
        if id(p) not in added and p.is_floating_point() and p.numel() and not p.is_meta:
            found[name] = p.detach().flatten()[:: max(1, p.numel() // SAMPLED)][:SAMPLED].tolist()
    return found


def read_sample(found: Any) -> dict[str, list[float]]:
    """What `sampled` made, read from JSON.

    Raises:
        ValueError: if it is something else.
    """
    if not isinstance(found, dict) or not all(isinstance(numbers, list) for numbers in found.values()):
        raise ValueError("a sample of weights is a table of lists")
    if not all(isinstance(x, int | float) for numbers in found.values() for x in numbers):
        raise ValueError("a sample of weights holds numbers")
    return found


def alike(one: dict[str, list[float]], other: dict[str, list[float]]) -> bool:
    """Whether two samples are of one model, give or take the rounding of half precision."""
    if one.keys() != other.keys() or any(len(one[name]) != len(other[name]) for name in one):
        return False
    pairs = [pair for name in one for pair in zip(one[name], other[name], strict=True)]
    near = sum(abs(a - b) <= 0.02 * abs(a) + 1e-6 for a, b in pairs)
    return near >= 0.9 * len(pairs)


def attachment(model: nn.Module) -> Attachment | None:
    """What is attached to `model`, which may be wrapped, if anything."""
    return getattr(unwrap(model), ATTACHED, None)


def attached(model: nn.Module) -> Attachment:
    """What is attached to `model`.

    Raises:
        ValueError: if nothing is.
    """
    done = attachment(model)
    if done is None:
        raise ValueError(f"nothing is attached to this {type(model).__name__}; see tessera.attach")
    return done


def reading(model: nn.Module, on: bool) -> None:
    """Let reads count, or not: the control that shows what the memory is worth."""
    for layer in attached(model).layers.values():
        layer.reads = on


def tensor_cache(model: nn.Module) -> Attachment:
    """The Tensor Cache that is attached to `model`.

    Raises:
        ValueError: if there is none.
    """
    done = attached(model)
    if done.kind != "TensorCache":
        raise ValueError(f"a {done.kind} is attached to this {type(model).__name__}; this needs a TensorCache")
    return done
