"""The attention weight of the first token, which is a sink in many models: heads without a match attend to it.

After "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453). The error of a codec in the key of a
token that draws half of all attention is felt by every query, so such a token is best kept exact: "sink:4".
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Mean weight over the heads of a layer above which the first token is called a sink. In models without a sink some layer gives
#: it up to about 0.35 in a text of a hundred tokens; in models with one, more than 0.5 at any length.
SINK = 0.4
#: Number of newest queries whose weights are averaged.
QUERIES = 16


def first_key_weight(
    query: Tensor, key: Tensor, scale: float, softcap: float | None = None, s_aux: Tensor | None = None
) -> Tensor:
    """Mean weight that the newest queries give to the first key, over rows, heads and the last `QUERIES` queries.

    Args:
        query: (rows, q_heads, tokens, head_dim).
        key: (rows, kv_heads, slots, head_dim); the last query is that of the last slot, and queries see all slots up to theirs.
        scale: what scores are multiplied by.
        softcap: scores become softcap · tanh(score / softcap).
        s_aux: (q_heads,) logits that take part in the softmax.
    """
    rows, heads, tokens, dim = query.shape
    slots, few = key.shape[2], min(QUERIES, tokens)
    newest = query[:, :, tokens - few :].float().reshape(rows, key.shape[1], -1, few, dim)
    scores = (newest @ key.float().unsqueeze(2).transpose(-1, -2)).reshape(rows, heads, few, slots) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    later = torch.ones(few, slots, dtype=torch.bool, device=key.device).triu(slots - few + 1)
    scores = scores.masked_fill(later, float("-inf"))
    whole = scores.logsumexp(-1)
    if s_aux is not None:
        whole = torch.logaddexp(whole, s_aux.float().view(1, -1, 1).expand_as(whole))
    return (scores[..., 0] - whole).exp().mean()
