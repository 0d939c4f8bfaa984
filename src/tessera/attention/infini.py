"""Infini-attention in a model, over whole sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tessera.associative.infini import Infini
from tessera.associative.rotary import Phase
from tessera.attention.plain import places, positions
from tessera.cache.layer import Handle


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
    if isinstance(key, Handle):
        raise ValueError("Infini-attention keeps its own memory; run this model without a tessera.Cache")
    place, real = places(query, key, mask)
    if not real.all():
        raise ValueError("Infini-attention counts its segments from the first slot; give it rows without left padding")
    where = positions(query, place, position_ids)
    n, past = query.shape[2], key.shape[2] - query.shape[2]
    phase: Phase = module.infini_phase[0]
    plain_q, plain_k = phase.remove(query, where[:, past:]), phase.remove(key, where)
    if past:
        # The memory is made again from all tokens; queries that were answered before are not asked again.
        query, plain_q = (torch.cat((x.new_zeros((*x.shape[:2], past, x.shape[3])), x), dim=2) for x in (query, plain_q))
    out, _ = infini(query, key, value, plain_q, plain_k, scaling)
    return out[:, :, past : past + n].transpose(1, 2).contiguous()
