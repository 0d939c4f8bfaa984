"""Seeing what attention modules give to their attention function, for measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from tessera.attention.forward import attention_forward
from tessera.cache.deferred import ATTENTION


@dataclass(frozen=True)
class Call:
    """What an attention module gave to Tessera's attention function.

    Attributes:
        module: the model's attention module.
        query: (batch, q_heads, tokens, head_dim), after the rotary embedding.
        key: (batch, kv_heads, slots, head_dim), likewise; deferred where the call is made through a `tessera.Cache`.
        value: likewise, without a rotary embedding.
        mask: (batch or 1, heads or 1, tokens, slots), or None: causal.
        options: whatever else was given by name, "scaling" among it.
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
        """What scores are multiplied with."""
        scaling = self.options.get("scaling")
        return float(self.query.shape[-1] ** -0.5 if scaling is None else scaling)


@contextmanager
def observed(see: Callable[[Call], None]) -> Iterator[None]:
    """Within the block, have `see` called before each call of attention is answered, in every model that `enable` was given.

    What `see` does with `attention_forward` itself is not observed. For measurements in one thread: the function is exchanged
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
