"""What the tiers of a layer hold as plain tensors, for whatever cannot read tiers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tessera.cache.lane import Part
from tessera.cache.masks import Runs
from tessera.kernels import Pages


def assemble(
    lanes: Iterable[tuple[list[int], Runs, list[Part]]],
    size: tuple[int, int, int, int],
    first: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    device: torch.device | None,
) -> tuple[Tensor, Tensor]:
    """Decode parts into dense keys and values.

    Args:
        lanes: for each group of batch rows these rows, the slots of their tokens, and what is held of them.
        size: (batch, kv_heads, slots, head_dim) of the result.
        first: slot that becomes the first of the result; what lies before it is left out.
        dtypes: of keys and of values.
        device: of the result.

    Returns:
        keys and values, zero where nothing is held.
    """
    keys, values = (torch.zeros(size, dtype=dtype, device=device) for dtype in dtypes)
    for rows, slots, parts in lanes:
        index = torch.tensor(rows, device=keys.device)
        for part in parts:
            wanted = slots.cut(part.start, part.start + part.tokens)
            skip = wanted.before(first)
            if skip < part.tokens:
                at = index[:, None], slice(None), wanted.cut(skip, part.tokens).index(index.device) - first
                k, v = part.held.decode() if isinstance(part.held, Pages) else part.held
                keys[at] = k[:, :, skip:].to(keys).transpose(1, 2)
                values[at] = v[:, :, skip:].to(values).transpose(1, 2)
    return keys, values
