"""Kernels: attention over packed keys and values, their decoding, the search that packs them, recurrences of memories.

Each is defined in PyTorch and implemented in C++ and Triton; `tessera.kernels.dispatch` chooses. All take `backend`: one of
`tessera.kernels.dispatch.BACKENDS`, or None for what the environment variable TESSERA_BACKEND says, or else the fastest.
"""

from __future__ import annotations

from torch import Tensor

from tessera.kernels import dispatch
from tessera.kernels.compressed_kv import Coded, CompressedKV
from tessera.kernels.dispatch import merge, nearest, nearest_directions
from tessera.kernels.params import AttendParams

__all__ = ["AttendParams", "CompressedKV", "attend", "decode", "merge", "nearest", "nearest_directions"]

#: The name that `CompressedKV` had before.
Pages = CompressedKV


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
    """Partial attention over packed keys and values.

    Args:
        q: (batch, q_heads, q_tokens, head_dim).
        packed_k, packed_v: keys and values of one layer, (batch, kv_heads, tokens, head_dim); kv_heads divides q_heads.
        scale, mask, softcap, start, window: see `AttendParams`.
        backend: see above.

    Returns:
        out: (batch, q_heads, q_tokens, head_dim) float32, 0 where a query sees nothing.
        lse: (batch, q_heads, q_tokens) float32, -inf where a query sees nothing.

    Raises:
        ValueError: for shapes that do not fit, or a backend that cannot do it.
    """
    return dispatch.attend(q, CompressedKV([(packed_k, packed_v)]), AttendParams(scale, mask, softcap, start, window), backend)


def decode(packed: Coded, backend: str | None = None) -> Tensor:
    """Decode packed vectors to (batch, heads, tokens, head_dim) float32."""
    return dispatch.decode(packed, backend)
