"""Standard errors of means over the tokens of a text, which account for the correlation of neighbouring tokens.

A cache's effects on neighbouring predictions are similar: they read the same keys with the same errors, and a hard passage is
hard for many tokens. A standard error that assumes independent tokens is then too small. So the tokens of a window are cut into
blocks of neighbours, and the error is computed between blocks (batch means, or a cluster-robust error with blocks as clusters).

Assumptions: blocks are independent of each other, which holds if the correlation of tokens decays within about a block; and
there are enough blocks to estimate their spread, about ten or more. The error does not say how much another text would differ:
a text is one sample of its kind.
"""

from __future__ import annotations

import math

from torch import Tensor

#: Maximum number of tokens of a block.
NEIGHBOURS = 64
#: Minimum number of blocks, if there are as many tokens: short texts are cut into smaller blocks.
BLOCKS = 16


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of a quantity over tokens.

    For a paired error give the difference of two quantities at the same tokens: their common part cancels.

    Args:
        values: (windows, tokens), in the order of the text within a window; no block spans two windows.

    Returns:
        in the unit of `values`; 0.0 where there is one token only.
    """
    windows, tokens = values.shape
    if windows * tokens < 2:
        return 0.0
    size = max(1, min(NEIGHBOURS, windows * tokens // BLOCKS))
    centred = values.double() - values.double().mean()
    # Blocks may be shorter at the end of a window, so sums are compared instead of means.
    sums = [block.sum(1) for block in centred.split(size, dim=1)]
    count = windows * len(sums)
    square = sum(float(each.square().sum()) for each in sums)
    return math.sqrt(square * count / max(1, count - 1)) / (windows * tokens)
