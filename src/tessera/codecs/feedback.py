"""Error feedback between the chunks of a vector, where errors have different weights in different directions.

An error e counts as eᵀMe, M symmetric and positive. With M = L·D·Lᵀ, L unit lower and D diagonal, both in blocks of a chunk,
that is the sum over chunks of |(Lᵀe)_i|² in the metric D_i, and (Lᵀe)_i = e_i + Σ_{j>i} L_jiᵀ e_j. So chunks are coded from the
last to the first, each with a target that minimises this sum: LDLQ, the rule of Chee et al., "QuIP" (arXiv 2307.13304), and of
Frantar et al., "GPTQ" (arXiv 2210.17323), for weights; here it encodes keys as they arrive.
"""

from __future__ import annotations

import torch
from torch import Tensor


def feedback(weights: Tensor, rotation: Tensor) -> Tensor:
    """Return the matrix for `tessera.kernels.dispatch.encode_feedback`: Lᵀ without the blocks on its diagonal.

    Args:
        weights: (..., d) float32, positive: weight of a squared error of each channel before the rotation.
        rotation: (d, d), the rotation R of y = x @ R.T; d is a multiple of four.

    Returns:
        (..., d, d) float32, zero in the blocks on the diagonal and below.
    """
    metric = (rotation * weights.unsqueeze(-2)) @ rotation.T
    # Positive weights make it definite, so what a device has to say of that is not waited for.
    root, _ = torch.linalg.cholesky_ex(metric, check_errors=metric.device.type == "cpu")
    n = root.shape[-1] // 4
    columns = root.unflatten(-1, (n, 4)).movedim(-2, -3)  # (..., n, d, 4)
    diagonal = columns.unflatten(-2, (n, 4)).diagonal(dim1=-4, dim2=-3).movedim(-1, -3)  # (..., n, 4, 4)
    one = torch.eye(4, dtype=root.dtype, device=root.device).expand_as(diagonal)
    inverse = torch.linalg.solve_triangular(diagonal, one, upper=False)
    lower = (columns @ inverse).movedim(-3, -2).flatten(-2)
    chunk = torch.arange(root.shape[-1], device=root.device) // 4
    return lower.masked_fill(chunk[:, None] <= chunk, 0.0).mT.contiguous()
