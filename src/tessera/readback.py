"""Reads of numbers from a device, gathered into one transfer.

Reading a number from another device waits for all work queued there. So a read is noted where the need for it arises, and the
first caller that cannot go on without its number transfers all noted reads together.
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Awaited(ABC):
    """A read that is yet to be made."""

    @abstractmethod
    def pending(self) -> Tensor | None:
        """Return the tensor to be read, or None; `receive` is then given its numbers."""

    @abstractmethod
    def receive(self, said: NDArray[np.generic]) -> None:
        """Take the numbers, in the shape and dtype of the tensor that `pending` returned."""


class _Waiting(threading.local):
    """The reads that this thread has noted, by weak references: one that nobody holds any more is not made."""

    def __init__(self) -> None:
        self.each: weakref.WeakSet[Awaited] = weakref.WeakSet()


_WAITING = _Waiting()


def note(awaited: Awaited) -> None:
    """Add a read to this thread's next transfer."""
    _WAITING.each.add(awaited)


def bring(*wanted: Awaited) -> None:
    """Make these reads and all that this thread has noted: one synchronisation, or none if nothing is pending."""
    asked = [(each, each.pending()) for each in dict.fromkeys((*wanted, *_WAITING.each))]
    _WAITING.each.clear()
    found = [(each, tensor) for each, tensor in asked if tensor is not None]
    if not found:
        return
    if len(found) == 1:
        ((each, tensor),) = found
        each.receive(tensor.detach().cpu().numpy())
        return
    device = next((tensor.device for _, tensor in found if tensor.device.type != "cpu"), torch.device("cpu"))
    parts = [x.detach().contiguous().view(-1).view(torch.uint8).to(device, non_blocking=True) for _, x in found]
    said = torch.cat(parts).cpu().numpy()
    at = 0
    for (each, tensor), part in zip(found, parts, strict=True):
        own = said[at : at + part.numel()].view(_numpy(tensor.dtype)).reshape(tuple(tensor.shape))
        at += part.numel()
        each.receive(own)


class HostCopy(Awaited):
    """A tensor of which the host will want a copy: `get` transfers it, unless another `bring` has done so by then.

    Args:
        tensor: bool, int64 or float32, of any shape.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor: Tensor | None = tensor
        self._said: NDArray[np.generic] | None = None
        note(self)

    def pending(self) -> Tensor | None:
        """See `Awaited`."""
        return self._tensor

    def receive(self, said: NDArray[np.generic]) -> None:
        """See `Awaited`."""
        self._said, self._tensor = said, None

    def get(self) -> NDArray[np.generic]:
        """Return the numbers, with a synchronisation if they have not been transferred yet."""
        if self._said is None:
            bring(self)
        assert self._said is not None
        return self._said


def _numpy(dtype: torch.dtype) -> np.dtype[np.generic]:
    return np.dtype({torch.bool: np.bool_, torch.int64: np.int64, torch.float32: np.float32}[dtype])
