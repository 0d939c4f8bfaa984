"""A packed tier as kernels read it: pages of keys and values, one behind the other."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:  # a codec stands above the kernels; here it is only named
    from tessera.codecs import Packed


class Pages:
    """Packed keys and values, (batch, kv_heads, tokens, head_dim) in all. Immutable.

    Args:
        pages: at least one pair of keys and values of one codec, of equal shapes; only tokens may differ from page to page.

    Attributes:
        pages: as given.
        shape: (batch, kv_heads, tokens, head_dim).
        memo: what backends derive from the pages and want to keep as long as they live.
    """

    def __init__(self, pages: Sequence[tuple[Packed, Packed]]) -> None:
        if not pages:
            raise ValueError("there are no pages")
        self.pages = tuple(pages)
        first = self.pages[0][0]
        for keys, values in self.pages:
            if keys.shape != values.shape:
                raise ValueError(f"keys {tuple(keys.shape)} and values {tuple(values.shape)} differ in shape")
            if (keys.shape[:2], keys.shape[3]) != (first.shape[:2], first.shape[3]) or keys.codec != first.codec:
                raise ValueError(f"a page of {keys.describe()} beside one of {first.describe()}")
        self.starts = (0, *accumulate(keys.tokens for keys, _ in self.pages))
        self.shape = (*first.shape[:2], self.starts[-1], first.shape[3])
        self.memo: dict[Any, Any] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Pages:
        # What backends keep, addresses among it, is of these pages and not of their copies.
        return Pages(deepcopy(self.pages, memo))

    @property
    def tokens(self) -> int:
        """Number of tokens held."""
        return self.starts[-1]

    def decode(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens [start, stop)."""
        stop = self.tokens if stop is None else stop
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for at, (k, v) in zip(self.starts, self.pages, strict=False):
            a, b = max(start - at, 0), min(stop - at, k.tokens)
            if a < b or (not keys and at + k.tokens == self.tokens):
                keys.append(k.slice(a, b).decode())
                values.append(v.slice(a, b).decode())
        return (keys[0], values[0]) if len(keys) == 1 else (torch.cat(keys, 2), torch.cat(values, 2))
