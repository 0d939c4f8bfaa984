"""Kernels: attention over packed keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from tessera.kernels import dispatch
from tessera.kernels.pages import Pages
from tessera.kernels.reference import merge

if TYPE_CHECKING:
    from tessera.codecs import Packed

__all__ = ["Pages", "attend", "merge"]


def attend(
    q: Tensor,
    packed_k: Packed,
    packed_v: Packed,
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
