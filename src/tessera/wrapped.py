"""`unwrap`: finds the model within wrappers for training, sharding, compiling or adapting."""

from __future__ import annotations

from typing import Any

from torch import nn

#: Wrappers that recorded the parameters or the code of the model at their construction, with the message for each.
_FIXED = {
    "DistributedDataParallel": "synchronises only the parameters that the model had when it was wrapped",
    "FullyShardedDataParallel": "shards only the parameters that the model had when it was wrapped",
    "DeepSpeedEngine": "trains only the parameters that the model had when it was wrapped",
    "DataParallel": "runs copies of the model, whose hooks would be those of the original",
    "OptimizedModule": "may go on with code that was compiled for the model as it was",
}
#: Those of them whose model's parameters are sharded.
_SHARDED = ("FullyShardedDataParallel", "DeepSpeedEngine")


def unwrap(model: Any) -> Any:
    """Find the model within `DataParallel`, `DistributedDataParallel`, a model of peft, `torch.compile`, and the like.

    Args:
        model: any object; one that is no wrapper is returned unchanged.
    """
    while True:
        inner = _inner(model)
        if inner is None:
            return model
        model = inner


def unwrap_to_change(model: Any, what: str) -> Any:
    """Do what `unwrap` does, but refuse wrappers that would not notice a change of the model's modules.

    Args:
        model: see `unwrap`.
        what: the function that changes it, as users call it.

    Raises:
        ValueError: for such a wrapper.
    """
    outer = model
    while (inner := _inner(model)) is not None:
        for kind in type(model).__mro__:
            if kind.__name__ in _FIXED:
                raise ValueError(
                    f"{what}: {type(outer).__name__} {_FIXED[kind.__name__]}; call {what} on the model itself, before it is "
                    "wrapped"
                )
        model = inner
    return model


def unwrap_to_read(model: Any, what: str) -> Any:
    """Do what `unwrap` does, but refuse wrappers that shard the parameters.

    Args:
        model: see `unwrap`.
        what: the function that reads them, as users call it.

    Raises:
        ValueError: for a wrapper that has spread them.
    """
    for kind in type(model).__mro__:
        if kind.__name__ in _SHARDED:
            raise ValueError(f"{what}: {type(model).__name__} has spread the parameters; gather them in the model itself first")
    return unwrap(model)


def replaces_cache(model: Any) -> str | None:
    """Say why a model of peft would not use the cache that it is given, or return None if it would."""
    if any(kind.__module__.split(".")[0] == "peft" for kind in type(model).__mro__):
        kind = getattr(getattr(model, "active_peft_config", None), "peft_type", None)
        if getattr(kind, "value", kind) in ("PREFIX_TUNING", "CARTRIDGE"):
            return (
                f"peft's {getattr(kind, 'value', kind)} begins every text with a DynamicCache of its own in place of the cache "
                "that it is given; use prompt tuning or LoRA, or no tessera.Cache"
            )
    inner = _inner(model)
    return None if inner is None else replaces_cache(inner)


def _inner(model: Any) -> nn.Module | None:
    """Return what a wrapper wraps; None if it is no wrapper."""
    if not isinstance(model, nn.Module):
        return None
    kinds = type(model).__mro__
    if any(kind.__module__.split(".")[0] == "peft" for kind in kinds):
        # Adapters are inside the model; prompts belong to the wrapper.
        found: Any = getattr(model, "get_base_model", None)
        inner = getattr(model, "model", None) if found is None else found()
    elif any(kind.__name__ == "OptimizedModule" for kind in kinds):
        inner = model._orig_mod
    elif any(kind.__name__ in _FIXED for kind in kinds):
        inner = model.module
    else:
        return None
    return inner if isinstance(inner, nn.Module) and inner is not model else None
