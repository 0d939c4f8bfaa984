"""Placeholders that the cache gives a model instead of keys and values, which only Tessera's attention function can read."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

if TYPE_CHECKING:
    from tessera.cache_layers.cache_layer import TesseraLayer

#: Name of the attention function in transformers' `AttentionInterface`.
ATTENTION = "tessera"

#: The error of torch.compile where it may not break its graph.
UNCOMPILED = "a tessera.Cache holds other tokens at every call, so the graph breaks here: compile without fullgraph=True"


class DeferredKVError(AttributeError):
    """Raised when something other than Tessera's attention uses deferred keys or values."""


class DeferredKV:
    """A placeholder for the keys or values of a layer between the cache and Tessera's attention function.

    Any other use raises an error that names the remedy: tensor methods and attributes, and torch functions.

    Args:
        layer: the cache's layer that has these keys or values.
        role: "key" or "value".
    """

    __slots__ = ("layer", "role")

    def __init__(self, layer: TesseraLayer, role: str) -> None:
        self.layer = layer
        self.role = role

    def _refuse(self, what: str) -> NoReturn:
        used = _attention_of_caller()
        if used is None or used == ATTENTION:
            raise DeferredKVError(
                f"the attention of this model uses the cached {self.role}s directly ({what}), so it cannot read Tessera's "
                "tiers. Call tessera.disable(model) to have them decoded for it."
            )
        raise DeferredKVError(
            f"the attention of this model is {used!r}, which cannot read Tessera's tiers ({what} of the cached {self.role}s); "
            "the cache was made for another model, or another copy of it. Call tessera.enable(model) on the one that is called."
        )

    def __getattr__(self, name: str) -> Any:
        # Copying, compiling and inspecting ask for names of Python's own, also before an object's slots are set.
        if name in DeferredKV.__slots__ or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self._refuse(f".{name}")

    def __getitem__(self, index: object) -> Any:
        self._refuse("indexing")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse torch functions that are given deferred keys or values, and operators between them and a tensor."""
        found = _first(cls, (args, kwargs or {}))
        name = getattr(function, "__name__", str(function))
        if found is None:
            raise DeferredKVError(f"torch's {name} was given keys or values that only Tessera's attention can read")
        found._refuse(name)


def _first(kind: type[DeferredKV], given: Any) -> DeferredKV | None:
    """The first deferred keys or values among arguments, which may be in lists of them."""
    if isinstance(given, kind):
        return given
    if isinstance(given, dict):
        given = given.values()
    elif not isinstance(given, list | tuple):
        return None
    return next((found for each in given if (found := _first(kind, each)) is not None), None)


def _attention_of_caller() -> str | None:
    """Find the attention implementation of the module that uses deferred keys or values; None if no module is found.

    The cache cannot know it, because it may be given to another model than the one it was made for.
    """
    frame = sys._getframe(1)
    while frame is not None:
        for name in ("self", "module"):
            module = frame.f_locals.get(name)
            if isinstance(module, nn.Module):
                used = getattr(getattr(module, "config", None), "_attn_implementation", None)
                if isinstance(used, str):
                    return used
        frame = frame.f_back  # type: ignore[assignment]
    return None
