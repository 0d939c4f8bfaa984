"""Attention in a segment of documents whose state is carried on, see `tessera.cache.carry`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tessera.associative.layer import TensorCacheLayer
from tessera.associative.rotary import Phase
from tessera.attention.plain import Limits, Softmax, windowed
from tessera.cache.carry import CarriedLayer


def over_segment(
    module: Any,
    layer: CarriedLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_ids: Tensor | None,
    softmax: Softmax,
) -> Tensor:
    """The next segment of documents whose state `layer` carries on; (batch, tokens, heads, head_dim)."""
    batch, n = query.shape[0], query.shape[2]
    positions = torch.arange(n, device=query.device)[None] + layer.seen if position_ids is None else position_ids
    layer.seen += n
    if getattr(module, "infini", None) is not None:
        phase: Phase = module.infini_phase[0]
        plain = phase.remove(query, positions), phase.remove(key, positions)
        out, layer.infini = module.infini(query, key, value, *plain, softmax.scaling, layer.infini)
        return out.transpose(1, 2).contiguous()
    memory: TensorCacheLayer | None = getattr(module, "tensor_cache", None)
    limits = module.limits if memory is None else Limits(memory.config.window, memory.config.sink)
    if memory is not None:
        real = torch.ones((batch, n), dtype=torch.bool, device=query.device)
        memory.pending, layer.memory = memory(query, key, value, real, positions, layer.memory)
    key, value = layer.joined(key, value)
    # By slot instead of place: what was carried begins with the sinks, and all behind them are neighbours.
    slots = torch.arange(key.shape[2], device=query.device).expand(batch, -1)
    out = windowed(module, limits, query, key, value, slots, slots >= 0, softmax)
    layer.keep(key, value, limits.sink, limits.window)
    return out
