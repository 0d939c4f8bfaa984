"""Keeping autocast out of what is computed in float32 by definition."""

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
    """A block in which autocast does not round what is computed on a device."""
    # Entering a block of autocast takes longer than looking; and there is none for "meta", where nothing is computed.
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def without_autocast(kernel: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """The same function of a tensor, with autocast off for the tensor's device: it would round products to half precision."""

    @wraps(kernel)
    def run(x: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with no_autocast(x.device):
            return kernel(x, *args, **kwargs)

    return run


def join(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Tensors one behind the other in the widest of their dtypes; autocast to one half precision refuses to join the other."""
    with no_autocast(parts[0].device):
        return torch.cat(list(parts), dim)
