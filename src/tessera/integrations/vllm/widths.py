"""The one place where queries and keys are scaled on their way to attention.

Where a codec is to keep some channels of keys more finely than others, keys are multiplied by a width for each channel before
anything is kept, and queries are divided by it, which changes no score.
"""

from __future__ import annotations

from torch import Tensor


def scaled(q: Tensor, k: Tensor, widths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Queries divided and keys multiplied by widths.

    Args:
        q: (tokens, heads, head_dim).
        k: (tokens, kv_heads, head_dim).
        widths: (kv_heads, head_dim) float32, positive; None: all are 1.

    Returns:
        q and k, of the same shapes and dtypes.
    """
    if widths is None:
        return q, k
    shared = widths.repeat_interleave(q.shape[1] // k.shape[1], 0)
    return (q.float() / shared).to(q.dtype), (k.float() * widths).to(k.dtype)
