"""Rules for outliers, chunks that are kept in half precision: Med3x and its variants.

Med3x (HQMQ, arXiv 2605.27646): a chunk whose radius is over C = 3 times the median radius is kept as four half-precision
numbers and flagged. The rules differ in what the median is taken over:

- "paper": the chunks of the call, of one (sequence, layer, head, role). The paper's median includes the batch too, so that
  other sequences would change the result of one. Its authors recommend a running median where a call has few chunks, but do not
  implement it; results would then depend on how a sequence was cut, and a crop could not undo it. A cache instead gives a codec
  with this rule blocks of a fixed number of tokens (`Codec.by_call`);
- "authors": all chunks of the call, over the batch too, as their code does;
- "vector": the chunks of the same vector. Ours: the result for a token depends on nothing but the token.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

OutlierRule = Literal["vector", "paper", "authors"]


def find_outliers(radii: Tensor, factor: float, rule: OutlierRule) -> Tensor:
    """Find the chunks to keep in half precision.

    Args:
        radii: (batch, heads, tokens, chunks).
        factor: the paper's C.
        rule: see above.

    Returns:
        bool, of the shape of `radii`.
    """
    if radii.numel() == 0:
        return torch.zeros_like(radii, dtype=torch.bool)
    if rule == "vector":
        median = radii.median(-1, keepdim=True).values
    elif rule == "paper":
        median = radii.flatten(2).median(-1).values[:, :, None, None]
    else:
        median = radii.transpose(0, 1).flatten(1).median(1).values[None, :, None, None]
    return radii > factor * median
