"""What the tiers of a layer hold as plain tensors, for whatever cannot read tiers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tessera.cache.lane import Part
from tessera.kernels import Pages


def assemble(
    lanes: Iterable[tuple[list[int], int, list[Part]]], size: tuple[int, int, int, int], first: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Decode parts into dense keys and values.

    Args:
        lanes: for each group of batch rows these rows, the slots of padding before their first token, and what is held of them.
        size: (batch, kv_heads, slots, head_dim) of the result.
        first: slot that becomes the first of the result; what lies before it is left out.
        like: a tensor of the dtype and on the device that the result shall have.

    Returns:
        keys and values, zero where nothing is held.
    """
    keys, values = like.new_zeros(size), like.new_zeros(size)
    for rows, pad, parts in lanes:
        index = torch.tensor(rows, device=keys.device)
        for part in parts:
            a = pad + part.start - first
            skip = max(0, -a)
            if skip < part.tokens:
                span = slice(a + skip, a + part.tokens)
                k, v = part.held.decode() if isinstance(part.held, Pages) else part.held
                keys[index, :, span] = k[:, :, skip:].to(keys)
                values[index, :, span] = v[:, :, skip:].to(values)
    return keys, values
