"""Kernels: attention over packed keys and values."""

from __future__ import annotations

from torch import Tensor

from tessera.kernels import dispatch
from tessera.kernels.pages import Coded, Pages
from tessera.kernels.reference import merge

__all__ = ["Pages", "attend", "merge"]


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
