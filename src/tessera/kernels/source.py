"""A source of keys and values, and the positions of the queries relative to it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tessera.kernels.compressed_kv import CompressedKV


class Source(NamedTuple):
    """Keys and values that queries read in one operation.

    Attributes:
        held: packed pages, or keys and values (batch, kv_heads, tokens, head_dim).
        start, window: as of `AttendParams`.
    """

    held: CompressedKV | tuple[Tensor, Tensor]
    start: int | None = None
    window: int | None = None
