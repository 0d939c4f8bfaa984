"""Which errors of later chunks make up for those of earlier ones, where errors do not count alike in all directions.

An error e counts as eᵀMe, M symmetric and positive. With M = L·D·Lᵀ, L unit lower and D diagonal, both in blocks of a chunk,
that is the sum over chunks of |(Lᵀe)_i|² in the metric D_i, and (Lᵀe)_i = e_i + Σ_{j>i} L_jiᵀ e_j. So chunks are coded from
the last to the first, each aiming at what makes this sum small: LDLQ, the rule of Chee et al., "QuIP" (arXiv 2307.13304), and
of Frantar et al., "GPTQ" (arXiv 2210.17323), for weights; here a key is coded by it when it comes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def feedback(weights: Tensor, rotation: Tensor) -> Tensor:
    """The lower triangle of L, whose blocks on the diagonal are left out.

    Args:
        weights: (..., d) float32, positive: how much a squared error of each channel counts before the rotation.
        rotation: (d, d), the rotation R of y = x @ R.T; d is a multiple of four.

    Returns:
        (..., d, d) float32, zero in the blocks on the diagonal and above.
    """
    metric = (rotation * weights.unsqueeze(-2)) @ rotation.T
    root = torch.linalg.cholesky(metric)
    n = root.shape[-1] // 4
    columns = root.unflatten(-1, (n, 4)).movedim(-2, -3)  # (..., n, d, 4)
    diagonal = columns.unflatten(-2, (n, 4)).diagonal(dim1=-4, dim2=-3).movedim(-1, -3)  # (..., n, 4, 4)
    one = torch.eye(4, dtype=root.dtype, device=root.device).expand_as(diagonal)
    inverse = torch.linalg.solve_triangular(diagonal, one, upper=False)
    lower = (columns @ inverse).movedim(-3, -2).flatten(-2)
    chunk = torch.arange(root.shape[-1], device=root.device) // 4
    return lower.masked_fill(chunk[:, None] <= chunk, 0.0)


def encode_with_feedback(x: Tensor, lower: Tensor, nearest: Callable[[Tensor], Tensor], codewords: Tensor) -> Tensor:
    """Code the chunks of vectors from the last to the first.

    Args:
        x: (batch, heads, tokens, d) float32, rotated and divided by the scales.
        lower: (batch, heads, d, d), see `feedback`.
        nearest: (m, 4) -> (m,) integers, the codes of the nearest codewords.
        codewords: (codes, 4) float32.

    Returns:
        codes (batch, heads, tokens, d / 4) int32.
    """
    n = x.shape[-1] // 4
    codes = torch.empty((*x.shape[:-1], n), dtype=torch.int32, device=x.device)
    error = torch.zeros_like(x)
    for i in reversed(range(n)):
        here, later = slice(4 * i, 4 * i + 4), slice(4 * i + 4, None)
        aim = x[..., here] - error[..., later] @ lower[..., later, here] if i < n - 1 else x[..., here]
        codes[..., i] = nearest(aim.reshape(-1, 4)).view(codes.shape[:-1])
        error[..., here] = codewords[codes[..., i].long()] - x[..., here]
    return codes
