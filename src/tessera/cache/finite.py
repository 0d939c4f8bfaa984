"""Checks that keys and values are finite, on their own device; the host reads the result once per call.

Reading a number from another device waits for all work queued there. So every finding is added to a flag on that device,
numbers that are not finite are encoded as zeros, and the flag is read when the next call begins, together with that call's
mask. On a CPU there is nothing to wait for, and non-finite numbers are refused at once.
"""

from __future__ import annotations

import torch
from torch import Tensor


class FiniteCheck:
    """The findings of all layers of a cache.

    Attributes:
        at_once: refuse at once, whatever the device; False: never; None: on a CPU. Set it to find the call that makes such
            numbers.
        broken: non-finite numbers are in the cache, so that only a reset helps.
    """

    def __init__(self) -> None:
        self.at_once: bool | None = None
        self.broken = False
        self._found: Tensor | None = None  # () bool on a device: whether there was a finding since it was last read

    def look(self, k: Tensor, v: Tensor) -> None:
        """Check pairs that a memory is about to absorb.

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
        """Whether a finding on this device is reported later."""
        return device.type != "cpu" if self.at_once is None else not self.at_once

    def add(self, found: Tensor) -> None:
        """Add a finding, () bool: whether there is a number that is not finite."""
        self._found = found if self._found is None else self._found.to(found.device, non_blocking=True) | found

    def pending(self) -> Tensor | None:
        """Return the findings since the last read, () bool on a device, for the caller to read; None: no check was made."""
        found, self._found = self._found, None
        return found

    def tell(self, found: bool) -> None:
        """Record the value that the caller has read.

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
        """Read the findings now, which synchronises with the device if there are any to read.

        Raises:
            ValueError: see `tell`.
        """
        found = self.pending()
        self.tell(found is not None and bool(found))

    def reset(self) -> None:
        """Clear the findings, for a cache that was reset."""
        self.broken, self._found = False, None
