"""The identity of a model: a few kilobytes that distinguish it from others, and descriptions of differences."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from tessera.adapters import attached_memory
from tessera.adapters.attached import SAMPLED, fingerprint, read_fingerprint, same_fingerprint
from tessera.wrapped import unwrap

#: Fields of a config about its origin and how it is run, which do not change what the model computes.
_PASSING = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}


@dataclass(frozen=True)
class Identity:
    """The identity of a model.

    Attributes:
        name: the name it was loaded by; not compared.
        kind: name of its class.
        config: SHA-256 of its config.
        dtype: dtype of its weights, as "float32".
        weights: a few numbers of each weight.
        memory: the same of an attached memory; None: there is none.
    """

    name: str
    kind: str
    config: str
    dtype: str
    weights: dict[str, list[float]]
    memory: dict[str, list[float]] | None = None

    @staticmethod
    def of(model: Any, name: str = "") -> Identity:
        """Compute the identity of a transformers model, which may be wrapped."""
        model = unwrap(model)
        done = attached_memory(model)
        said = json.dumps(_plain(model.config.to_dict()), sort_keys=True, default=str)
        return Identity(
            name=name,
            kind=type(model).__name__,
            config=hashlib.sha256(said.encode()).hexdigest(),
            dtype=str(model.dtype).removeprefix("torch."),
            weights=fingerprint(model),
            memory=None if done is None else _sample(done.modules()),
        )

    @staticmethod
    def read(found: Any) -> Identity:
        """Read a result of `to_dict`.

        Raises:
            ValueError: if it is something else.
        """
        texts = ("name", "kind", "config", "dtype")
        if not isinstance(found, dict) or found.keys() != {*texts, "weights", "memory"}:
            raise ValueError("a model's identity is a table of six fields")
        if not all(isinstance(found[key], str) for key in texts):
            raise ValueError("a model's name, class, config and dtype are text")
        memory = None if found["memory"] is None else read_fingerprint(found["memory"])
        return Identity(**{**found, "weights": read_fingerprint(found["weights"]), "memory": memory})

    def to_dict(self) -> dict[str, Any]:
        """Return the identity as a dictionary for JSON."""
        return asdict(self)

    def difference(self, other: Identity) -> str | None:
        """Describe how another model differs from this one; None if they are the same.

        Weights of one dtype must have the same numbers; of two, the same give or take rounding.
        """
        if other.kind != self.kind:
            return f"it is a {other.kind}, not a {self.kind}"
        if other.config != self.config:
            return f"it is a {other.kind} of another configuration"
        exact = other.dtype == self.dtype
        if not _same(self.weights, other.weights, exact):
            return "it has other weights: another revision, or trained further"
        if (self.memory is None) != (other.memory is None):
            return "it has no memory attached" if other.memory is None else "it has a memory attached"
        if self.memory is not None and other.memory is not None and not _same(self.memory, other.memory, exact):
            return "it has another memory attached"
        return None


def _same(one: dict[str, list[float]], other: dict[str, list[float]], exact: bool) -> bool:
    return one == other if exact and one.keys() == other.keys() else same_fingerprint(one, other)


def _sample(modules: dict[str, Any]) -> dict[str, list[float]]:
    return {
        f"{place}.{name}": tensor.flatten()[:: max(1, tensor.numel() // SAMPLED)][:SAMPLED].tolist()
        for place, module in modules.items()
        for name, tensor in module.state_dict().items()
        if tensor.is_floating_point() and tensor.numel()
    }


def _plain(found: Any) -> Any:
    if isinstance(found, dict):
        return {str(key): _plain(value) for key, value in found.items() if key not in _PASSING}
    return [_plain(value) for value in found] if isinstance(found, list | tuple) else found
