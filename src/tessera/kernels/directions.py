"""The product of a Hurwitz unit and a secondary quaternion that is nearest to a chunk's direction: the definition.

Only the S secondaries are searched: <x, q_p·q_s> = <x·conj(q_s), q_p>, and the best unit for that is in closed form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.kernels.precision import without_autocast
from tessera.quaternion import UNITS, nearest_unit, unit_projection

#: Maximum number of projections in memory at once.
MANY = 1 << 22


@without_autocast
def nearest_directions(chunks: Tensor, rotations: Tensor) -> tuple[Tensor, Tensor]:
    """The best direction code s · 24 + p of every chunk, and the chunk's projection on it.

    Args:
        chunks: (batch, heads, tokens, n, 4).
        rotations: (heads or 1, S, 4, 4), y = rotations @ x being x·conj(q_s); its dtype is that of the search.

    Returns:
        (batch, heads, tokens, n), int64 and float32.
    """
    codes = torch.empty(chunks.shape[:-1], dtype=torch.long, device=chunks.device)
    best = torch.empty(chunks.shape[:-1], dtype=torch.float32, device=chunks.device)
    for head in range(chunks.shape[1]):
        rotation = rotations[head if len(rotations) > 1 else 0]
        flat = chunks[:, head].reshape(-1, 4).to(rotation.dtype)
        found = [_search(part, rotation) for part in flat.split(max(1, MANY // len(rotation)))]
        found = found or [(flat.new_zeros(0).long(), flat.new_zeros(0))]
        shape = codes[:, head].shape
        codes[:, head] = torch.cat([c for c, _ in found]).view(shape)
        best[:, head] = torch.cat([b for _, b in found]).float().view(shape)
    return codes, best


def _search(x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    rotated = (x @ rotation.flatten(0, 1).T).unflatten(-1, (-1, 4))  # (n, S, 4)
    projection, s = unit_projection(rotated).max(-1)
    p = nearest_unit(rotated.gather(1, s[:, None, None].expand(-1, 1, 4)).squeeze(1))
    return s * UNITS + p, projection
