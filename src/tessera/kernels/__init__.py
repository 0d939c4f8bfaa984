"""Kernels: attention over packed keys and values, what these stand for, the search that packs them, recurrences of memories.

Each is defined in PyTorch and implemented in C++ and Triton; `tessera.kernels.dispatch` chooses. All take `backend`: one of
`tessera.kernels.dispatch.BACKENDS`, or None for what the environment variable TESSERA_BACKEND says, or else the fastest.
"""

from __future__ import annotations

from torch import Tensor

from tessera.kernels import dispatch
from tessera.kernels.dispatch import merge, nearest, nearest_directions
from tessera.kernels.pages import Coded, Pages

__all__ = ["Pages", "attend", "decode", "merge", "nearest", "nearest_directions"]


def attend(
    q: Tensor,
    packed_k: Coded,
    packed_v: Coded,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    *,
    start: int | None = None,
    window: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Partial attention over packed keys and values; see `tessera.kernels.dispatch.attend`, which takes pages of them."""
    pages = Pages([(packed_k, packed_v)])
    return dispatch.attend(q, pages, scale, mask, softcap, start=start, window=window, backend=backend)


def decode(packed: Coded, backend: str | None = None) -> Tensor:
    """What packed vectors stand for, (batch, heads, tokens, head_dim) float32."""
    found = dispatch.decode(packed, backend)
    return packed.codec.decode_reference(packed) if found is None else found
