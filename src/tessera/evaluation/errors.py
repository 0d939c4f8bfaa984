"""How far a mean over the tokens of a text may be off: standard errors that know that neighbouring tokens resemble each other.

What a cache does to one prediction it tends to do to the next: both read the same keys with the same errors in them, and a
hard passage is hard for many tokens. A standard error that takes tokens for independent is then too small. So the tokens of
a window are cut into blocks of neighbours, and the blocks are what varies (batch means, or a cluster-robust error with
blocks as clusters).

What is assumed: blocks are independent of each other, which holds if the correlation of tokens dies out within a block or
so; and there are enough blocks for their spread to be known, which with fewer than about ten it hardly is. What is not
said: how far another text would differ. A text is one sample of its kind.
"""

from __future__ import annotations

import math

from torch import Tensor

#: Tokens of a block of neighbours at most.
NEIGHBOURS = 64
#: Blocks that there are at least, if there are as many tokens: short texts are cut into smaller blocks.
BLOCKS = 16


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of a quantity over tokens.

    For a paired error give the difference of two quantities at the same tokens: what both share has gone out of it.

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
