"""Infini-attention in a model, over whole sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tessera.attention.documents import SlidingWindow
from tessera.attention.read_masks import read_documents
from tessera.cache_layers.cache_layer import DeferredKV
from tessera.tensor_cache.infini import Infini
from tessera.tensor_cache.rotary import Phase


def over_whole(
    module: Any,
    infini: Infini,
    query: Tensor,
    key: Any,
    value: Any,
    mask: Tensor | None,
    scaling: float | None,
    position_ids: Tensor | None,
) -> Tensor:
    """Infini-attention over whole sequences; (batch, tokens, heads, head_dim)."""
    if isinstance(key, DeferredKV):
        raise ValueError("Infini-attention keeps its own memory; run this model without a tessera.Cache")
    batch, n, slots = query.shape[0], query.shape[2], key.shape[2]
    past = slots - n
    if not read_documents(mask, query, slots, SlidingWindow(slots, 0)).of.single:
        raise ValueError(
            "Infini-attention counts its segments from the first slot; give it rows of one document without padding"
        )
    where = torch.arange(slots, device=query.device).expand(batch, -1)
    if position_ids is not None:
        # Earlier tokens are assumed to have the positions before them.
        where = where + (position_ids[:, :1] - past)
        where = torch.cat((where[:, :past].clamp(min=0), position_ids.expand(batch, -1)), dim=1)
    phase: Phase = module.infini_phase[0]
    plain_q, plain_k = phase.remove(query, where[:, past:]), phase.remove(key, where)
    if past:
        # The memory is computed again from all tokens; only new queries are computed.
        query, plain_q = (torch.cat((x.new_zeros((*x.shape[:2], past, x.shape[3])), x), dim=2) for x in (query, plain_q))
    out, _ = infini(query, key, value, plain_q, plain_k, scaling)
    return out[:, :, past : past + n].transpose(1, 2).contiguous()
