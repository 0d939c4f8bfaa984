"""Centring and scaling of key channels over a group of tokens, as KIVI groups them.

Keys have channels that are large, and nearly constant, in every token (Qwen2.5: 80 to 280 times the median). A rotation would
spread them over all coordinates and their quantisation error with them. So, for each group of tokens and each channel,
the mean is taken away, and a channel that is still much wider than the median channel is divided by a power of two.

Both are kept in one 16-bit word per channel and group: a half-precision number of which the low four bits, which a mean
does not need, hold the exponent.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: A channel is narrowed when its root mean square is over this many times that of the median channel.
WIDE = 4.0
#: Largest exponent, what four bits hold.
MOST = 15
#: Largest magnitude of a half-precision number.
HALF_MAX = 65504.0


def split_groups(x: Tensor, group: int) -> Tensor:
    """(b, h, t, d) -> (b, h, groups, group, d); an incomplete last group is filled up with its own last token."""
    missing = -x.shape[2] % group
    if missing:
        x = torch.cat((x, x[:, :, -1:].expand(-1, -1, missing, -1)), dim=2)
    return x.unflatten(2, (-1, group))


def fit(x: Tensor, group: int) -> Tensor:
    """Measure each group's channels.

    Args:
        x: (batch, heads, tokens, d) float32.
        group: tokens that share a word.

    Returns:
        words: (batch, heads, ceil(tokens / group), d) int16, see `unpack`.
    """
    tokens = x.shape[2]
    parts = split_groups(x, group)
    real = torch.ones(tokens, dtype=torch.float32, device=x.device)
    weight = torch.nn.functional.pad(real, (0, -tokens % group)).view(-1, group, 1)
    count = weight.sum(1)
    mean = ((parts * weight).sum(3) / count).clamp(-HALF_MAX, HALF_MAX)
    mean, _ = unpack(_word(mean, torch.zeros_like(mean)))
    spread = (((parts - mean.unsqueeze(3)) * weight).square().sum(3) / count).sqrt()
    # A group in which most channels are constant has no median width to compare with, so it is not narrowed.
    typical = spread.median(-1, keepdim=True).values
    ratio = spread / typical.clamp(min=torch.finfo(torch.float32).tiny)
    exponent = torch.where((ratio > WIDE) & (typical > 0), ratio.log2().floor().clamp(0, MOST), 0.0)
    return _word(mean, exponent)


def _word(mean: Tensor, exponent: Tensor) -> Tensor:
    """Round the mean to half precision with the low four bits free, and store the exponent in them."""
    bits = mean.half().view(torch.int16).int() & 0xFFFF
    # Add half a unit of the shortened mantissa, but never beyond the largest finite number.
    rounded = torch.where((bits & 0x7FFF) < 0x7BF0, bits + 8, bits) & 0xFFF0
    word = rounded | exponent.int()
    return torch.where(word >= 0x8000, word - 0x10000, word).to(torch.int16)


def unpack(words: Tensor) -> tuple[Tensor, Tensor]:
    """words int16 -> (mean, factor), float32, of the same shape: a channel was (x - mean) / factor."""
    return means(words), torch.exp2((words & 15).float())


def means(words: Tensor) -> Tensor:
    """Return the first result of `unpack`."""
    return (words & -16).view(torch.float16).float()


def apply(x: Tensor, words: Tensor, index: Tensor) -> Tensor:
    """(x - mean) / factor. x: (b, h, t, d); words: (b, h, groups, d); index: (t,) group of each token."""
    mean, factor = unpack(words)
    return (x - mean.index_select(2, index)) / factor.index_select(2, index)


def invert(y: Tensor, words: Tensor, index: Tensor) -> Tensor:
    """Inverse of `apply`."""
    mean, factor = unpack(words)
    return y * factor.index_select(2, index) + mean.index_select(2, index)
