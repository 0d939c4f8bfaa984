"""Causal attention for training on a CPU, written as batched matrix products.

PyTorch's fused attention does not reach the bf16 instructions of CPUs without a tile unit. Plain `baddbmm` does: with
head_dim 64, forward and backward together were measured at half the time for 512 tokens and three quarters for 2,048.
Queries are taken in blocks so that the scores above the diagonal are, for the most part, never computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NAME = "tessera_blockwise"
"""The name under which `register` makes the attention known to transformers."""

BLOCK = 256
"""Queries per block: the fastest of 128, 256 and 512 at the lengths the demo trains on."""


def blockwise_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, block: int = BLOCK) -> Tensor:
    """Return causal softmax attention over whole sequences, in bf16.

    Args:
        query: (batch, heads, tokens, head_dim).
        key: the same shape; grouped heads already repeated.
        value: the same shape.
        scale: what scores are multiplied by.
        block: queries per block.

    Returns:
        (batch, heads, tokens, head_dim) in bf16.
    """
    batch, heads, tokens, width = query.shape
    q, k, v = (x.to(torch.bfloat16).reshape(batch * heads, tokens, width) for x in (query, key, value))
    reads = []
    for start in range(0, tokens, block):
        end = min(start + block, tokens)
        rows = torch.arange(start, end, device=q.device)[:, None]
        future = torch.arange(end, device=q.device)[None] > rows
        bias = torch.zeros(future.shape, dtype=q.dtype, device=q.device).masked_fill_(future, float("-inf"))
        scores = torch.baddbmm(bias, q[:, start:end], k[:, :end].transpose(1, 2), alpha=scale)
        reads.append(torch.softmax(scores, dim=-1, dtype=torch.bfloat16) @ v[:, :end])
    return torch.cat(reads, dim=1).view(batch, heads, tokens, width)


def _forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    repeats = query.shape[1] // key.shape[1]
    # Training batches have no padding, so the mask is only causal and that of transformers is not used.
    with torch.autocast(query.device.type, enabled=False):
        read = blockwise_attention(
            query, key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1), scaling
        )
    return read.transpose(1, 2), None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def register() -> str:
    """Make the attention known to transformers and return its name (for ``attn_implementation=``)."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, _no_mask)
    return NAME
