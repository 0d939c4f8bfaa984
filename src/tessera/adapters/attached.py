"""`AttachedMemory`: the record of what `attach` changed in a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tessera.cache_layers.cache_layer import ATTACHED
from tessera.devices import weights
from tessera.wrapped import unwrap

#: How many numbers of each weight a fingerprint samples.
SAMPLED = 4


@dataclass
class AttachedMemory:
    """The changes that `attach` made to a model, so that they can be undone.

    Attributes:
        config: configuration of the memory, a `TensorCacheConfig` or a `TensorMemoryConfig`.
        shape: the model's sizes that the memory depends on, as JSON.
        layers: the module added to each layer of the model, by index.
        shared: the module that all layers share, or None.
        hooks: the hooks on the model's modules.
        frozen: parameters that were trainable before, and become so again.
        limited: attention modules that got a window without a memory, each with its earlier limits, or None.
        enabled: whether the model's attention was switched.
        owner: an identifier by which caches recognise this memory's states; empty for a Tensor Cache.
        names: names of the tensors of each of `modules`, before anything has wrapped a part of it.
    """

    config: Any
    shape: dict[str, Any]
    layers: dict[int, Any] = field(default_factory=dict)
    shared: nn.Module | None = None
    hooks: list[RemovableHandle] = field(default_factory=list)
    frozen: list[nn.Parameter] = field(default_factory=list)
    limited: list[tuple[nn.Module, Any]] = field(default_factory=list)
    enabled: bool = False
    owner: str = ""
    names: dict[str, frozenset[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.names = {place: frozenset(module.state_dict()) for place, module in self.modules().items()}

    @property
    def kind(self) -> str:
        """ "TensorCache" or "TensorMemory"."""
        return type(self.config).__name__.removesuffix("Config")

    def modules(self) -> dict[str, nn.Module]:
        """All added modules, by their names in a file."""
        named: dict[str, nn.Module] = {str(index): layer for index, layer in self.layers.items()}
        return named if self.shared is None else {"shared": self.shared, **named}


def wrapped(module: nn.Module) -> dict[str, str]:
    """Find the parts of a module that are wrapped, as by a LoRA of peft: the wrapper's name, and the part's name within it."""
    found: dict[str, str] = {}
    for place, part in module.named_modules():
        core, inner = place, getattr(part, "base_layer", None)
        while isinstance(inner, nn.Module):
            core, inner = f"{core}.base_layer", getattr(inner, "base_layer", None)
        if core != place and not any(place.startswith(f"{outer}.") for outer in found):
            found[place] = core
    return found


def fingerprint(model: nn.Module) -> dict[str, list[float]]:
    """Sample a few numbers of every weight of the model itself, by name, which tell it from others of its shape.

    Adapters around its layers do not count, and weights that are offloaded are read where they are.
    """
    model = unwrap(model)
    done = attached_memory(model)
    added = () if done is None else {id(p) for module in done.modules().values() for p in module.parameters()}
    cores = wrapped(model)
    found = {}
    for name, tensor, parameter in weights(model):
        own = _own_name(name, cores)
        if own is not None and id(parameter) not in added and _can_be_read(tensor):
            # Under FSDP2 every process holds a shard.
            tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            found[own] = tensor.flatten()[:: max(1, tensor.numel() // SAMPLED)][:SAMPLED].tolist()
    return found


def _own_name(name: str, cores: dict[str, str]) -> str | None:
    """Return a weight's name without wrappers; None for a weight of a wrapper."""
    place = next((place for place in cores if name.startswith(f"{place}.")), None)
    if place is None:
        return name
    core = cores[place]
    return place + name[len(core) :] if name.startswith(f"{core}.") else None


def _can_be_read(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 0 and not tensor.is_meta


def read_fingerprint(found: Any) -> dict[str, list[float]]:
    """Read a result of `fingerprint` from JSON.

    Raises:
        ValueError: if it is something else.
    """
    if not isinstance(found, dict) or not all(isinstance(numbers, list) for numbers in found.values()):
        raise ValueError("a sample of weights is a table of lists")
    if not all(isinstance(x, int | float) and abs(x) < 1e300 for numbers in found.values() for x in numbers):
        raise ValueError("a sample of weights holds numbers")
    return found


def same_fingerprint(one: dict[str, list[float]], other: dict[str, list[float]]) -> bool:
    """Whether two fingerprints are of one model, up to the rounding of half precision."""
    common = one.keys() & other.keys()
    if ((one or other) and not common) or any(len(one[name]) != len(other[name]) for name in common):
        return False
    for table, rest in ((one, other), (other, one)):
        # A model may name one or both of two tied weights, depending on how it was loaded.
        if not all(any(_near(table[name], own) for own in rest.values()) for name in table.keys() - common):
            return False
    pairs = [pair for name in common for pair in zip(one[name], other[name], strict=True)]
    return sum(_close(a, b) for a, b in pairs) >= 0.9 * len(pairs)


def _near(one: list[float], other: list[float]) -> bool:
    return len(one) == len(other) and all(_close(a, b) for a, b in zip(one, other, strict=True))


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 0.02 * abs(a) + 1e-6


def attached_memory(model: nn.Module) -> AttachedMemory | None:
    """Return the memory attached to `model`, which may be wrapped, or None."""
    return getattr(unwrap(model), ATTACHED, None)


def require_attached(model: nn.Module) -> AttachedMemory:
    """Return the memory attached to `model`.

    Raises:
        ValueError: if nothing is.
    """
    done = attached_memory(model)
    if done is None:
        raise ValueError(f"nothing is attached to this {type(model).__name__}; see tessera.attach")
    return done


def reading(model: nn.Module, on: bool) -> None:
    """Switch the memory's reads on or off, as a control experiment."""
    for layer in require_attached(model).layers.values():
        layer.reads = on


def tensor_cache(model: nn.Module) -> AttachedMemory:
    """Return the Tensor Cache that is attached to `model`.

    Raises:
        ValueError: if there is none.
    """
    done = require_attached(model)
    if done.kind != "TensorCache":
        raise ValueError(f"a {done.kind} is attached to this {type(model).__name__}; this needs a TensorCache")
    return done
