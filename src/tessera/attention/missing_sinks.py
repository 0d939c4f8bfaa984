"""A warning where a cache compresses a first token that draws much of the model's attention."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.attention.first_token_weight import SINK, first_key_weight
from tessera.attention.windowed import Softmax
from tessera.cache_layers.cache_layer import CacheContext, TesseraLayer
from tessera.cache_layers.group import StepContext
from tessera.readback import Awaited, note

#: With fewer new tokens the weight means little: among a few keys the first one has much weight anyway.
ENOUGH = 64


def warn_if_sinks_are_missing(
    layer: TesseraLayer, query: Tensor, steps: Sequence[StepContext], scale: float, softmax: Softmax
) -> None:
    """Measure the first token's attention weight in the first call of a cache without sinks; warn once if it is large.

    In that call it costs little, because the call begins the sequence and its keys are still exact. It must have more than
        `ENOUGH` tokens. Only layers of the second half without a sliding window are measured, until one has a sink. After the
        last layer of that call nothing more is measured.

    Args:
        layer: layer of the cache; its `context.sinks_known` says whether the check is done.
        query: (batch, q_heads, tokens, head_dim).
        steps: steps of the call, as `TesseraLayer.begin_step` gave them.
        scale: what scores are multiplied by.
        softmax: how scores become weights.
    """
    context, policy = layer.context, layer.policy
    context.sinks_known = layer.index == context.last
    if layer.index < context.last // 2 or layer.sliding is not None or not policy.codecs or policy.sink:
        return
    if len(steps) != 1 or steps[0].first or steps[0].pending is None or steps[0].tokens <= ENOUGH:
        return
    (step,) = steps
    assert step.pending is not None
    rows = query if step.index is None else query.index_select(0, step.index)
    weight = first_key_weight(step.queries.of(rows, 0, 2), step.pending[0], scale, softmax.softcap, softmax.s_aux)
    if not policy.finite.defers(query.device):
        context.sinks_known |= warned(layer.index, float(weight))
        return
    if context.unread is None:
        context.unread = FirstWeights(context)
    context.unread.add(layer.index, weight)


def warned(layer: int, weight: float) -> bool:
    """Warn if a first token draws so much attention that it is a sink. Returns whether it does."""
    if weight > SINK:
        warnings.warn(
            f"the first token draws {weight:.0%} of the attention of layer {layer}, and this cache compresses it, as its "
            "spec has no sinks: what the model says will differ more than it need. Add 'sink:4' to the spec.",
            stacklevel=3,
        )
    return weight > SINK


class FirstWeights(Awaited):
    """The weights of the first token measured by layers on a device, transferred together with the next call's reads.

    Args:
        context: context of their cache, which holds this until then.
    """

    def __init__(self, context: CacheContext) -> None:
        self._context = context
        self._measured: list[tuple[int, Tensor]] = []

    def add(self, layer: int, weight: Tensor) -> None:
        """A layer has measured the weight of the first token, () float32."""
        self._measured.append((layer, weight))
        note(self)

    def pending(self) -> Tensor | None:
        """See `Awaited`."""
        device = self._measured[0][1].device
        return torch.stack([weight.to(device, non_blocking=True) for _, weight in self._measured])

    def receive(self, said: NDArray[np.generic]) -> None:
        """See `Awaited`."""
        self._context.unread = None
        any(warned(layer, float(weight)) for (layer, _), weight in zip(self._measured, said, strict=True))
