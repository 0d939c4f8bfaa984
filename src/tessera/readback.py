"""What the host has to learn from a device, brought in one transfer.

Whoever reads a number on another device waits for all that the device has been told to do. So what is to be read is noted where
it comes up, and the first one who cannot go on without knowing brings everything that is noted along with its own.
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
    """Waits for numbers that are on a device."""

    @abstractmethod
    def pending(self) -> Tensor | None:
        """What is to be read; None: nothing. It is asked for once, and `receive` is given the numbers."""

    @abstractmethod
    def receive(self, said: NDArray[np.generic]) -> None:
        """Take in the numbers, in the shape and dtype of what `pending` returned."""


class _Waiting(threading.local):
    """What this thread has noted. Weak, as whoever is gone waits no more."""

    def __init__(self) -> None:
        self.each: weakref.WeakSet[Awaited] = weakref.WeakSet()


_WAITING = _Waiting()


def note(awaited: Awaited) -> None:
    """Have this thread's next `bring` read along what `awaited` waits for."""
    _WAITING.each.add(awaited)


def bring(*wanted: Awaited) -> None:
    """Read what these wait for, and all that this thread has noted: one synchronisation, or none if nothing is pending."""
    asked = [(each, each.pending()) for each in dict.fromkeys((*wanted, *_WAITING.each))]
    _WAITING.each.clear()
    found = [(each, tensor) for each, tensor in asked if tensor is not None]
    if not found:
        return
    device = next((tensor.device for _, tensor in found if tensor.device.type != "cpu"), torch.device("cpu"))
    parts = [x.detach().contiguous().view(-1).view(torch.uint8).to(device, non_blocking=True) for _, x in found]
    said = (parts[0] if len(parts) == 1 else torch.cat(parts)).cpu().numpy()
    at = 0
    for (each, tensor), part in zip(found, parts, strict=True):
        own = said[at : at + part.numel()].view(_numpy(tensor.dtype)).reshape(tuple(tensor.shape))
        at += part.numel()
        each.receive(own)


class HostCopy(Awaited):
    """A tensor of which the host will want a copy: `get` brings it, unless another `bring` has by then.

    Args:
        tensor: bool or float32, of any shape.
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
        """The numbers, at the price of a synchronisation if nobody has brought them yet."""
        if self._said is None:
            bring(self)
        assert self._said is not None
        return self._said


def _numpy(dtype: torch.dtype) -> np.dtype[np.generic]:
    return np.dtype({torch.bool: np.bool_, torch.float32: np.float32}[dtype])
