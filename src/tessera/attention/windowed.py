"""Differentiable attention over plain tensors: with a window and sinks, and with options that PyTorch's lacks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import dropout, pad, scaled_dot_product_attention

from tessera.attention.documents import READS, Documents, MaskReading, SlidingWindow
from tessera.cache_layers.masks import boolean
from tessera.devices import upload
from tessera.finite import FiniteCheck
from tessera.tensor_cache.gated_read import TensorCacheLayer


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
    said: MaskReading,
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
        said: what the mask of the call says.
        softmax: how scores become weights.

    Returns:
        (batch, tokens, heads, head_dim).
    """
    n, slots = query.shape[2], key.shape[2]
    past, window = slots - n, limits.window
    out = []
    for number, a in enumerate(range(0, n, window)):
        b = min(a + window, n)
        if said.plain:
            # The sinks, and tokens near the diagonal.
            newest = torch.arange(past + a, past + b, device=query.device)
            columns = torch.arange(past + b, device=query.device)
            begin = max(0, past + a - window + 1)
            columns = torch.cat((columns[: min(begin, limits.sink)], columns[begin:]))
            distance = newest[:, None] - columns
            seen = ((distance >= 0) & ((distance < window) | (columns < limits.sink)))[None, None]
        else:
            columns, seen = said.block(limits, query.device, number)
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
    memory: TensorCacheLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    of: Documents,
    positions: Tensor | None,
    finite: FiniteCheck | None = None,
) -> Tensor:
    """Compute a Tensor Cache's contribution for the newest tokens of whole rows, differentiably, document by document.

    Args:
        memory: the layer's memory.
        query: (batch, heads, n, head_dim).
        key, value: (batch, kv_heads, slots, head_dim).
        of: the documents of all slots.
        positions: (batch, slots), where the memory needs them.
        finite: told of keys and values that are not finite, on devices where it defers that.

    Returns:
        (batch, n, hidden).
    """
    batch, n = query.shape[0], query.shape[2]
    slots, device = key.shape[2], query.device
    if of.single:
        real = torch.ones((batch, slots), dtype=torch.bool, device=device)
        return memory(query, key, value, real, positions, finite=finite)[0]
    found = _by_document(of, n, device)
    if found is None:
        return query.new_zeros((batch, n, memory.out.out_features))
    real, slot, entry, new, answer = found

    def by_document(x: Tensor) -> Tensor:
        """(batch, heads, slots, head_dim) -> (documents, heads, tokens, head_dim)."""
        table = x.new_zeros((*real.shape, x.shape[1], x.shape[3]))
        return table.index_put(entry, x[slot[0], :, slot[1]]).transpose(1, 2)

    where = None if positions is None else positions.new_zeros(real.shape).index_put(entry, positions[slot])
    asking = by_document(pad(query, (0, 0, slots - n, 0)))
    added, _ = memory(asking, by_document(key), by_document(value), real, where, finite=finite)
    return added.new_zeros((batch, n, added.shape[2])).index_put(new, added[answer])


class _Table(NamedTuple):
    """A table with a row for each document that a new token belongs to, its tokens at the end.

    Attributes:
        real: (documents, tokens) bool, whether there is a token.
        slot: of each token, the row of the batch and the slot.
        entry: of each token, the row and the column of the table.
        new: of each new token, the row of the batch, and its number among the new slots.
        answer: of each new token, the row and the column of the table.
    """

    real: Tensor
    slot: tuple[Tensor, Tensor]
    entry: tuple[Tensor, Tensor]
    new: tuple[Tensor, Tensor]
    answer: tuple[Tensor, Tensor]


@torch.compiler.disable(reason=READS)
def _by_document(of: Documents, n: int, device: torch.device) -> _Table | None:
    """Make the table for the documents of the newest n slots; None: all of these are padding."""
    rows, at = (of.number >= 0).nonzero()
    which = (of.place[rows, at] == 0).cumsum() - 1
    length = np.bincount(which)
    asked = np.bincount(which, weights=at >= of.slots - n) > 0
    kept = asked[which]
    rows, at, number = rows[kept], at[kept], (asked.cumsum() - 1)[which][kept]
    if not len(rows):
        return None
    most = int(length[asked].max())
    column = most - length[asked][number] + of.place[rows, at]
    real = np.zeros((int(asked.sum()), most), dtype=np.bool_)
    real[number, column] = True
    new = at >= of.slots - n

    def pair(first: NDArray[np.int64], second: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        return upload(torch.as_tensor(first), device), upload(torch.as_tensor(second), device)

    places = pair(rows[new], at[new] - (of.slots - n)), pair(number[new], column[new])
    return _Table(upload(torch.as_tensor(real), device), pair(rows, at), pair(number, column), *places)


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
