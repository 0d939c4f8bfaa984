"""Keeping autocast out of what is computed in float32 by definition."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(kernel: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """The same function of a tensor, with autocast off for the tensor's device: it would round products to half precision."""

    @wraps(kernel)
    def run(x: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast(x.device.type, enabled=False):
            return kernel(x, *args, **kwargs)

    return run
