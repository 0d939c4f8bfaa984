"""Observation of attention calls, for measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from tessera.attention.forward import attention_forward
from tessera.cache_layers.deferred import ATTENTION


@dataclass(frozen=True)
class Call:
    """The arguments that an attention module passed to Tessera's attention function.

    Attributes:
        module: the model's attention module.
        query: (batch, q_heads, tokens, head_dim), after the rotary embedding.
        key: (batch, kv_heads, slots, head_dim), likewise; deferred where the call is made through a `tessera.Cache`.
        value: (batch, kv_heads, slots, head_dim), without a rotary embedding.
        mask: (batch or 1, heads or 1, tokens, slots), or None: causal.
        options: the other keyword arguments, such as "scaling".
    """

    module: nn.Module
    query: Tensor
    key: Any
    value: Any
    mask: Tensor | None
    options: dict[str, Any]

    @property
    def layer(self) -> int:
        """Index of the layer in its model."""
        index: Any = self.module.layer_idx
        return int(index)

    @property
    def scale(self) -> float:
        """The factor of the scores."""
        scaling = self.options.get("scaling")
        return float(self.query.shape[-1] ** -0.5 if scaling is None else scaling)


@contextmanager
def observed(see: Callable[[Call], None]) -> Iterator[None]:
    """Call `see` before each attention call within the block, in every model that `enable` was given.

    Calls that `see` makes of `attention_forward` are not observed. For measurements in one thread: the function is exchanged
    for all models.
    """

    def seen(
        module: nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, None]:
        see(Call(module, query, key, value, attention_mask, options))
        return attention_forward(module, query, key, value, attention_mask, **options)

    AttentionInterface.register(ATTENTION, seen)
    try:
        yield
    finally:
        AttentionInterface.register(ATTENTION, attention_forward)
