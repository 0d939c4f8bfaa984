"""Switching a model's attention to Tessera's, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from tessera.attention.module_code import touches, windowed
from tessera.attention.weights import refuse_weights
from tessera.cache_layers.cache_layer import ATTACHED, ATTENTION
from tessera.wrapped import unwrap

M = TypeVar("M", bound=nn.Module)

#: Attribute in which `enable` keeps what `disable` restores.
_PREVIOUS = "_attention_before_tessera"


def enable(model: M) -> M:
    """Route the attention of `model` (a transformers model) through Tessera. Returns the model; calling it again is harmless.

    Without a `tessera.Cache` the model computes what it did before, but gives no attention weights: `output_attentions=True`
    is refused at the call.

    Raises:
        ValueError: for a model that does not ask transformers' `AttentionInterface` for its attention.
    """
    outer, model = model, unwrap(model)
    why = unsupported(model)
    if why:
        raise ValueError(f"tessera.enable: {type(model).__name__} cannot use Tessera's attention: {why}")
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    before = text._attn_implementation
    if before == ATTENTION:
        return outer
    _switch(model, ATTENTION)
    if text._attn_implementation != ATTENTION:
        raise ValueError(f"tessera.enable: {type(model).__name__} kept its attention {text._attn_implementation!r}")
    setattr(model, _PREVIOUS, before)
    refuse_weights(model)
    return outer


def disable(model: M) -> M:
    """Restore the attention that `model` had before `enable`. Returns the model.

    Raises:
        ValueError: if a Tensor Cache is attached, which lives in Tessera's attention.
    """
    done = getattr(unwrap(model), ATTACHED, None)
    if done is not None and done.kind == "TensorCache":
        raise ValueError("a Tensor Cache is attached to this model; take it away with tessera.detach(model)")
    return restore(model)


def restore(model: M) -> M:
    """Do what `disable` does, also with a memory attached."""
    outer, model = model, unwrap(model)
    config: Any = model.config
    if config.get_text_config(decoder=True)._attn_implementation == ATTENTION:
        _switch(model, getattr(model, _PREVIOUS, None) or ("sdpa" if getattr(model, "_supports_sdpa", False) else "eager"))
    return outer


@contextmanager
def using(model: M) -> Iterator[M]:
    """Route the attention of `model` through Tessera within a block: ``with tessera.using(model): ...``.

    When the block ends, also by an exception, every part of the model has the attention that it had before, whatever was
    switched within: by `enable`, `disable`, another `using`, or ``tessera.Cache(spec, model)``. Blocks may be nested. A Tensor
    Cache that is attached within the block and still there at its end needs Tessera's attention, so that then stays until
    `tessera.detach`, which gives the model its own back.

    Yields:
        the model.

    Raises:
        ValueError: for a model that does not ask transformers' `AttentionInterface` for its attention.
    """
    inner: Any = unwrap(model)
    why = unsupported(inner)
    if why:
        raise ValueError(f"tessera.using: {type(inner).__name__} cannot use Tessera's attention: {why}")
    text = inner.config.get_text_config(decoder=True)
    was_ours, noted = text._attn_implementation == ATTENTION, getattr(inner, _PREVIOUS, None)
    before = [(config, config._attn_implementation) for config in _configs(inner)]
    watch_no_more = refuse_weights(inner)
    try:
        enable(inner)
        yield model
    finally:
        done = getattr(inner, ATTACHED, None)
        if done is not None and done.kind == "TensorCache" and not was_ours:
            done.enabled = True  # so that `detach` switches back
        else:
            for config, implementation in before:
                config._attn_implementation_internal = implementation
            if noted is None:
                vars(inner).pop(_PREVIOUS, None)
            else:
                setattr(inner, _PREVIOUS, noted)
            watch_no_more()


def _configs(model: Any) -> Iterator[Any]:
    """Yield every config of a model that selects the attention of a part of it."""
    whole = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    while whole:
        config = whole.pop()
        yield config
        parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", ()))
        whole += [part for part in parts if part is not None]


def unsupported(model: Any) -> str | None:
    """Say why the model's attention cannot be replaced, or return None if it can."""
    if not hasattr(model, "set_attn_implementation") or not hasattr(model, "config"):
        return "it is not a transformers model"
    if not getattr(model, "_supports_attention_backend", False) or not model._can_set_attn_implementation():
        return "its code computes attention itself and does not ask transformers' AttentionInterface"
    text = model.config.get_text_config(decoder=True)
    if text._attn_implementation == ATTENTION:
        return None  # and was checked then
    slides = getattr(text, "sliding_window", None) is not None and getattr(text, "layer_types", None) is None
    for module in model.modules():
        if not type(module).__name__.endswith("Attention"):
            continue
        what = touches(module)
        if what is not None:
            return f"its {type(module).__name__} computes with the cached keys or values itself ({what})"
        if slides and hasattr(module, "layer_idx") and not windowed(module):
            return (
                f"its config has a sliding window ({text.sliding_window}), which {type(module).__name__} does not apply, so "
                "what it computes depends on how a text is cut"
            )
    return None


def _switch(model: Any, implementation: str) -> None:
    """Set the attention of the text model only; vision towers keep theirs."""
    config = model.config
    text = config.get_text_config(decoder=True)
    key = next((k for k in config.sub_configs if getattr(config, k, None) is text), None)
    model.set_attn_implementation(implementation if key is None else {key: implementation})
