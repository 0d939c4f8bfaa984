"""One step of a Tensor Memory as the paper defines it, in as many dimensions as the grid has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv3d

from tessera.tensor_memory.coordinates import solid


def volume(factors: Sequence[Tensor]) -> Tensor:
    """Multiply weights by axes, (batch, size) each, to those of cells, (batch, *grid)."""
    weights = factors[0]
    for factor in factors[1:]:
        weights = weights.unsqueeze(-1) * factor.view(len(factor), *[1] * (weights.ndim - 1), -1)
    return weights


def gate_inputs(content: Tensor, factors: Sequence[Tensor], h: Tensor | None) -> Tensor:
    """Concatenate the write and, unless None, the hidden state: (batch, channels or 2 channels, *grid)."""
    weights = volume(factors).unsqueeze(1)
    written = content.view(*content.shape, *[1] * len(factors)) * weights
    return written if h is None else torch.cat((written, h), dim=1)


def update(
    h: Tensor, c: Tensor, seen: Tensor, taps: Tensor | None, weight: Tensor, bias: Tensor, mask: Sequence[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Compute the new h and c, (batch, channels, *grid).

    Args:
        h, c: those before.
        seen: see `gate_inputs`.
        taps: (n, inputs, 3), a depthwise convolution along each axis; or None.
        weight: (4 channels, inputs), bias: (4 channels,): of the gates i, f, o, g.
        mask: weights of the update by axes, (batch, size) each; None: all cells are updated.
    """
    if taps is not None:
        near = solid(seen)
        for axis, tap in enumerate(taps.float().unbind(0)):
            along = axis + 3 - len(taps)
            size, padding = [1, 1, 1], [0, 0, 0]
            size[along], padding[along] = 3, 1
            near = conv3d(near, tap.view(-1, 1, *size), padding=padding, groups=near.shape[1])
        seen = near.view_as(seen)
    gates = (weight @ seen.flatten(2) + bias[:, None]).unflatten(2, h.shape[2:])
    i, f, o, g = gates.chunk(4, dim=1)
    new_c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    new_h = torch.sigmoid(o) * torch.tanh(new_c)
    if mask is None:
        return new_h, new_c
    weights = volume(mask).unsqueeze(1)
    return h + weights * (new_h - h), c + weights * (new_c - c)
