"""Attention over plain tensors, differentiable: to a window and sinks, and what PyTorch's own does not know."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, scaled_dot_product_attention

from tessera.cache.masks import boolean


class Limits(NamedTuple):
    """What a model's own attention sees: the newest `window` tokens, the query's own included, and the first `sink`."""

    window: int
    sink: int


class Softmax(NamedTuple):
    """How a model turns scores into weights.

    Attributes:
        dropout: of the weights, while training.
        scaling: of the scores; None: head_dim ** -0.5.
        softcap: scores become softcap · tanh(score / softcap).
        s_aux: (q_heads,) logits of sinks that take part in the softmax and give nothing.
    """

    dropout: float = 0.0
    scaling: float | None = None
    softcap: float | None = None
    s_aux: Tensor | None = None

    @property
    def usual(self) -> bool:
        """Whether PyTorch's own attention knows it."""
        return self.softcap is None and self.s_aux is None


def places(query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """For each slot its place in its row, padding not counted, and whether it is none: (batch, slots) int64 and bool."""
    batch, slots = query.shape[0], key.shape[2]
    real = torch.ones((batch, slots), dtype=torch.bool, device=query.device)
    if mask is not None:
        # A slot that no query of this call sees is padding, if it lies before all that some query sees.
        real = boolean(mask).any(dim=(1, 2)).expand(batch, -1).cumsum(1) > 0
    return torch.arange(slots, device=query.device)[None] - (slots - real.sum(1))[:, None], real


def positions(query: Tensor, place: Tensor, position_ids: Tensor | None) -> Tensor:
    """Rotary positions of all slots, (batch, slots), from those of the newest."""
    batch, slots = place.shape
    past = slots - query.shape[2]
    if position_ids is None or position_ids.ndim > 2:
        # Several positions a token, of time, height and width: a memory that leaves the phase on needs none.
        return place.clamp(min=0)
    newest = position_ids.expand(batch, -1)
    if not past:
        return newest
    # From the last slot, which is a token wherever padding is on the left.
    return (place + (newest[:, -1:] - place[:, -1:])).clamp(min=0)


def windowed(
    module: nn.Module,
    limits: Limits,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    place: Tensor,
    real: Tensor,
    softmax: Softmax,
) -> Tensor:
    """Attention to a window and to sinks over plain tensors, differentiable; only what lies near is computed.

    Returns (batch, tokens, heads, head_dim).
    """
    n, slots = query.shape[2], key.shape[2]
    past, window = slots - n, limits.window
    pads = int((place[:, -1:] + 1 - slots).abs().max())
    out = []
    for a in range(0, n, window):
        b = min(a + window, n)
        begin = max(0, past + a - window + 1)
        columns = torch.arange(begin, past + b, device=query.device)
        if begin:
            # The sinks of every row lie among the first slots that are not padding.
            columns = torch.cat((torch.arange(min(begin, pads + limits.sink), device=query.device), columns))
        distance = torch.arange(past + a, past + b, device=query.device)[:, None] - columns
        near = (distance >= 0) & (distance < window)
        sinks = (distance >= 0) & (place[:, None, columns] < limits.sink)
        seen = ((near | sinks) & real[:, None, columns])[:, None]
        # A padding query sees nothing; it is given itself, for a softmax over nothing is NaN.
        seen = seen | ((distance == 0) & ~real[:, past + a : past + b, None])[:, None]
        q, k, v = query[:, :, a:b], key[:, :, columns], value[:, :, columns]
        if softmax.usual:
            drop = softmax.dropout if module.training else 0.0
            grouped = query.shape[1] != key.shape[1]
            read = scaled_dot_product_attention(
                q, k, v, attn_mask=seen, dropout_p=drop, scale=softmax.scaling, enable_gqa=grouped
            )
            out.append(read.transpose(1, 2))
        else:
            out.append(dense(module, q, k, v, seen, softmax))
    return torch.cat(out, dim=1).contiguous()


def dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    softmax: Softmax,
) -> Tensor:
    """Attention with soft-capping and sinks over plain tensors, differentiable; PyTorch's own has neither."""
    batch, heads, tokens, dim = query.shape
    slots = key.shape[2]
    grouped = query.reshape(batch, key.shape[1], -1, dim)
    scores = (grouped @ key.transpose(-1, -2)).view(batch, heads, tokens, slots).float()
    scores = scores * (dim**-0.5 if softmax.scaling is None else softmax.scaling)
    if softmax.softcap is not None:
        scores = torch.tanh(scores / softmax.softcap) * softmax.softcap
    if mask is not None:
        seen = boolean(mask)
    elif tokens > 1 and getattr(module, "is_causal", True):
        # transformers leaves the mask out only where query i sees the slots up to i.
        seen = torch.ones(tokens, slots, dtype=torch.bool, device=query.device).tril()
    else:
        seen = torch.ones(1, 1, dtype=torch.bool, device=query.device)
    scores = scores.masked_fill(~seen, torch.finfo(torch.float32).min)
    if softmax.s_aux is not None:
        sinks = softmax.s_aux.float().view(1, -1, 1, 1).expand(batch, heads, tokens, 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    weights = dropout(weights.to(value.dtype), softmax.dropout, module.training)
    out = weights.view(batch, key.shape[1], -1, slots) @ value
    return out.view(batch, heads, tokens, -1).transpose(1, 2).contiguous()
