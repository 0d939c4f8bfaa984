"""Attention in a segment of documents with kept state, see `tessera.cache_layers.truncated_bptt`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tessera.attention.documents import SlidingWindow
from tessera.attention.read_masks import read_documents
from tessera.attention.windowed import Softmax, windowed
from tessera.cache_layers.truncated_bptt import TruncatedBPTTLayer
from tessera.tensor_cache.gated_read import MemoryCall
from tessera.tensor_cache.rotary import Phase


def over_segment(
    module: Any,
    layer: TruncatedBPTTLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_ids: Tensor | None,
    softmax: Softmax,
    call: MemoryCall | None,
) -> Tensor:
    """Compute the next segment of documents whose state `layer` keeps; (batch, tokens, heads, head_dim)."""
    batch, n = query.shape[0], query.shape[2]
    positions = torch.arange(n, device=query.device)[None] + layer.seen if position_ids is None else position_ids
    layer.seen += n
    if getattr(module, "infini", None) is not None:
        phase: Phase = module.infini_phase[0]
        plain = phase.remove(query, positions), phase.remove(key, positions)
        out, layer.infini = module.infini(query, key, value, *plain, softmax.scaling, layer.infini)
        return out.transpose(1, 2).contiguous()
    limits = module.limits if call is None else SlidingWindow(call.memory.config.window, call.memory.config.sink)
    if call is not None:
        real = torch.ones((batch, n), dtype=torch.bool, device=query.device)
        call.added, layer.memory = call.memory(query, key, value, real, positions, layer.memory)
    key, value = layer.joined(key, value)
    # Slots replace places: kept tokens begin with the sinks, and those after them are consecutive.
    out = windowed(module, limits, query, key, value, read_documents(None, query, key.shape[2], limits), softmax)
    layer.keep(key, value, limits.sink, limits.window)
    return out
