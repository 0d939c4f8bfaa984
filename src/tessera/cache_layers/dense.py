"""Decoding of a layer's tiers into plain tensors, for code that cannot read tiers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tessera.cache_layers.masks import Runs
from tessera.kernels import CompressedKV
from tessera.tiers import KVSource


def assemble(
    groups: Iterable[tuple[list[int], Runs, list[KVSource]]],
    size: tuple[int, int, int, int],
    first: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    device: torch.device | None,
) -> tuple[Tensor, Tensor]:
    """Decode sources into dense keys and values.

    Args:
        groups: for each group of batch rows: the rows, the slots of their tokens, and the sources that hold them.
        size: (batch, kv_heads, slots, head_dim) of the result.
        first: slot that becomes the first of the result; what lies before it is left out.
        dtypes: dtypes of keys and of values.
        device: device of the result.

    Returns:
        keys and values, zero where nothing is held.
    """
    keys, values = (torch.zeros(size, dtype=dtype, device=device) for dtype in dtypes)
    for rows, slots, sources in groups:
        index = torch.tensor(rows, device=keys.device)
        for source in sources:
            wanted = slots.cut(source.start, source.start + source.tokens)
            skip = wanted.before(first)
            if skip < source.tokens:
                at = index[:, None], slice(None), wanted.cut(skip, source.tokens).index(index.device) - first
                k, v = source.held.decode() if isinstance(source.held, CompressedKV) else source.held
                keys[at] = k[:, :, skip:].to(keys).transpose(1, 2)
                values[at] = v[:, :, skip:].to(values).transpose(1, 2)
    return keys, values
