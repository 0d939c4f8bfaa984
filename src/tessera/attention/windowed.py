"""Differentiable attention over plain tensors: with a window and sinks, and with options that PyTorch's lacks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, pad, scaled_dot_product_attention

from tessera.cache.masks import Documents, boolean
from tessera.tensor_cache.gated_read import TensorCacheLayer


class SlidingWindow(NamedTuple):
    """The limits of a model's attention: the newest `window` tokens, the query's own included, and the first `sink`."""

    window: int
    sink: int


class Softmax(NamedTuple):
    """The parameters by which a model turns scores into weights.

    Attributes:
        dropout: dropout rate of the weights, while training.
        scaling: what scores are multiplied by; None: head_dim ** -0.5.
        softcap: scores become softcap · tanh(score / softcap).
        s_aux: (q_heads,) logits of sinks that take part in the softmax and have no value.
    """

    dropout: float = 0.0
    scaling: float | None = None
    softcap: float | None = None
    s_aux: Tensor | None = None

    @property
    def usual(self) -> bool:
        """Whether PyTorch's attention supports it."""
        return self.softcap is None and self.s_aux is None


def windowed(
    module: nn.Module,
    limits: SlidingWindow,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    of: Documents,
    softmax: Softmax,
) -> Tensor:
    """Differentiable attention to a window and to sinks over plain tensors; only scores near the diagonal are computed.

    In its own document a query sees the first `limits.sink` tokens and those no older than its window, later ones included, as
    far as the mask shows them.

    Args:
        module: the model's attention module.
        limits: the window and the sinks.
        query: (batch, heads, tokens, head_dim).
        key, value: (batch, kv_heads, slots, head_dim).
        mask: (batch or 1, heads or 1, tokens, slots); None: causal.
        of: the documents of all slots.
        softmax: how scores become weights.

    Returns:
        (batch, tokens, heads, head_dim).
    """
    n, slots = query.shape[2], key.shape[2]
    past, window = slots - n, limits.window
    plain = mask is None and of.single
    shown = None if mask is None else boolean(mask)
    out = []
    for a in range(0, n, window):
        b = min(a + window, n)
        newest = torch.arange(past + a, past + b, device=query.device)
        columns = torch.arange(past + b if plain else slots, device=query.device)
        if plain:
            begin = max(0, past + a - window + 1)
            # The sinks, and tokens near the diagonal.
            columns = torch.cat((columns[: min(begin, limits.sink)], columns[begin:]))
            distance = newest[:, None] - columns
            seen = ((distance >= 0) & ((distance < window) | (columns < limits.sink)))[None, None]
        else:
            number, place = of.number[:, None, newest, None], of.place[:, None, newest, None]
            keys = of.number[:, None, None], of.place[:, None, None]
            seen = (number == keys[0]) & (number >= 0) & ((keys[1] > place - window) | (keys[1] < limits.sink))
            seen = seen & (columns <= newest[:, None] if shown is None else shown[:, :, a:b])
            columns = seen.any(dim=(0, 1, 2)).nonzero().flatten()
            # A padding query sees nothing; it is shown a token, because a softmax over nothing is NaN.
            columns = columns if len(columns) else newest[:1]
            seen = seen[..., columns] | (number < 0)
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


def recalled(
    memory: TensorCacheLayer, query: Tensor, key: Tensor, value: Tensor, of: Documents, positions: Tensor | None
) -> Tensor:
    """Compute a Tensor Cache's contribution for the newest tokens of whole rows, differentiably, document by document.

    Args:
        memory: the layer's memory.
        query: (batch, heads, n, head_dim).
        key, value: (batch, kv_heads, slots, head_dim).
        of: the documents of all slots.
        positions: (batch, slots), where the memory needs them.

    Returns:
        (batch, n, hidden).
    """
    batch, n = query.shape[0], query.shape[2]
    slots = key.shape[2]
    if of.single:
        real = torch.ones((batch, slots), dtype=torch.bool, device=query.device)
        return memory(query, key, value, real, positions)[0]
    # One row for each document that a new token belongs to, its tokens at the end.
    rows, at = (of.number >= 0).nonzero(as_tuple=True)
    begins = of.place[rows, at] == 0
    which = begins.long().cumsum(0) - 1
    length = which.bincount()
    asked = which.new_zeros(len(length)).index_add(0, which, (at >= slots - n).long()) > 0
    number = (asked.long().cumsum(0) - 1)[which]
    kept = asked[which]
    rows, at, number = rows[kept], at[kept], number[kept]
    if not len(rows):
        return query.new_zeros((batch, n, memory.out.out_features))
    most = int(length[asked].max())
    column = most - length[asked][number] + of.place[rows, at]
    real = torch.zeros((int(asked.sum()), most), dtype=torch.bool, device=query.device)
    real[number, column] = True

    def by_document(x: Tensor) -> Tensor:
        """(batch, heads, slots, head_dim) -> (documents, heads, tokens, head_dim)."""
        table = x.new_zeros((*real.shape, x.shape[1], x.shape[3]))
        return table.index_put((number, column), x[rows, :, at]).transpose(1, 2)

    where = None
    if positions is not None:
        where = positions.new_zeros(real.shape).index_put((number, column), positions[rows, at])
    added, _ = memory(by_document(pad(query, (0, 0, slots - n, 0))), by_document(key), by_document(value), real, where)
    new = at >= slots - n
    out = added.new_zeros((batch, n, added.shape[2]))
    return out.index_put((rows[new], at[new] - (slots - n)), added[number[new], column[new]])


def dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    softmax: Softmax,
) -> Tensor:
    """Differentiable attention with soft-capping and sinks over plain tensors; PyTorch's has neither."""
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
