"""Refusal of calls that ask for attention weights, which Tessera's attention never computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tessera.cache_layers.cache_layer import ATTENTION

#: Attribute of a model whose calls are checked.
_WATCHED = "_tessera_refuses_weights"


def refuse_weights(model: nn.Module) -> Callable[[], None]:
    """Have the models within `model`, itself included, refuse `output_attentions` for as long as their attention is Tessera's.

    This is a hook before the call, because not every family passes the flag on to its attention, where a cache would moreover
    have stored tokens already.

    Returns:
        a function that removes the hooks added here.
    """
    added = []
    for source in model.modules():
        if isinstance(source, PreTrainedModel) and not getattr(source, _WATCHED, False):
            added.append((source, source.register_forward_pre_hook(_look, with_kwargs=True)))
            setattr(source, _WATCHED, True)

    def undo() -> None:
        for source, hook in added:
            hook.remove()
            delattr(source, _WATCHED)

    return undo


def _look(model: nn.Module, _: Any, kwargs: dict[str, Any]) -> None:
    config: Any = model.config
    asked = kwargs.get("output_attentions")
    if asked is None:
        asked = getattr(config, "output_attentions", False)
    if asked and config.get_text_config(decoder=True)._attn_implementation == ATTENTION:
        raise ValueError(
            f"{type(model).__name__} was asked for attention weights (output_attentions=True), which Tessera's attention never "
            "makes; call tessera.disable(model) first, or tessera.detach(model) where a Tensor Cache is attached"
        )
