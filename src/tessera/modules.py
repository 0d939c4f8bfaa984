"""The base class of memory modules, whose parameters stay in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Float32Module(nn.Module):
    """A module whose floating-point parameters, its submodules' included, are float32 and stay so when a model is cast.

    `half`, `bfloat16`, `double` and `to(dtype)` of it or of a module around it move its parameters to another device at the
    most: in half precision a slow decay would be none, and what a memory absorbs adds up.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if not tensor.is_floating_point() or moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device)

        return super()._apply(keep, recurse)
