"""Disabling autocast for computations that are defined in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which autocast is off for a device."""
    # Entering a context of autocast takes longer than this check; and there is none for "meta", where nothing is computed.
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def without_autocast(kernel: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """Wrap a function of a tensor to run with autocast off for the tensor's device, which would round products."""

    @wraps(kernel)
    def run(x: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with no_autocast(x.device):
            return kernel(x, *args, **kwargs)

    return run


def join(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate tensors in the widest of their dtypes, which autocast to another half precision would refuse."""
    with no_autocast(parts[0].device):
        return torch.cat(list(parts), dim)
