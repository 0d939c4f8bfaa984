"""Whether what a cache takes in is finite: looked at where it is, and told to the host with its one look at a call.

Whoever reads a number on another device waits for all that the device has been told to do. So there every finding is added to a
flag on the device, numbers that are not finite are encoded as zeros, and the flag is read when the next call begins, together
with that call's mask. On a CPU there is nothing to wait for, and a finding is refused at once.
"""

from __future__ import annotations

import torch
from torch import Tensor


class FiniteCheck:
    """What the layers of a cache have found.

    Attributes:
        at_once: refuse at once, whatever the device; False: never; None: on a CPU. For looking for what makes such numbers.
        broken: something that is not finite has been taken in, so nothing but a reset helps.
    """

    def __init__(self) -> None:
        self.at_once: bool | None = None
        self.broken = False
        self._found: Tensor | None = None  # () bool on a device: whether there was anything since the last look

    def look(self, k: Tensor, v: Tensor) -> None:
        """Look at pairs that a memory is about to absorb.

        Raises:
            ValueError: if one is not finite and that is known at once.
        """
        if self.defers(k.device):
            self.add(~(k.isfinite().all() & v.isfinite().all()))
            return
        for name, x in (("keys", k), ("values", v)):
            if not x.isfinite().all():
                raise ValueError(f"{name} must be finite; a matrix that has absorbed NaN or infinity never recovers")

    def defers(self, device: torch.device) -> bool:
        """Whether what is found on a device is told later."""
        return device.type != "cpu" if self.at_once is None else not self.at_once

    def add(self, found: Tensor) -> None:
        """A finding, () bool: whether there is a number that is not finite."""
        self._found = found if self._found is None else self._found.to(found.device, non_blocking=True) | found

    def pending(self) -> Tensor | None:
        """What was found since the last look, () bool on a device, to be read by the caller; None: nothing was looked at."""
        found, self._found = self._found, None
        return found

    def tell(self, found: bool) -> None:
        """What the caller has read.

        Raises:
            ValueError: if it is true, or was once.
        """
        self.broken = self.broken or found
        if self.broken:
            raise ValueError(
                "an earlier call gave this cache keys or values that are NaN or infinite, and it holds what came of them: look "
                "for the call whose logits are not finite, and call cache.reset()"
            )

    def read(self) -> None:
        """Look now, at the price of a synchronisation if there is something to be read.

        Raises:
            ValueError: see `tell`.
        """
        found = self.pending()
        self.tell(found is not None and bool(found))

    def reset(self) -> None:
        """The cache has forgotten all that it held."""
        self.broken, self._found = False, None
