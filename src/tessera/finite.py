"""Checks that what a cache or a memory takes in is finite, on its own device; the host reads the result once per call.

Reading a number from another device waits for all work queued there. So every finding is added to a flag on that device,
numbers that are not finite are replaced by zeros, and the flag is read when the next call begins, together with that call's
mask (`tessera.readback`). On a CPU there is nothing to wait for, and non-finite numbers are refused at once.

Keys and values that a tier keeps exactly are not checked there, because they hide nothing: every query that reads one that is
not finite gives logits that are not finite either, as in any other cache. They are checked when a codec or a memory, which
could not give them back, takes them in.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.readback import Awaited, bring, note


class FiniteCheck(Awaited):
    """The findings of all layers of a cache.

    Attributes:
        at_once: refuse at once, whatever the device; False: never; None: on a CPU. Set it to find the call that makes such
            numbers.
        broken: non-finite numbers are in the cache, so that only a reset helps.
    """

    def __init__(self, at_once: bool | None = None) -> None:
        self.at_once = at_once
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
        note(self)

    def pending(self) -> Tensor | None:
        """See `Awaited`."""
        return self._found

    def receive(self, said: NDArray[np.generic]) -> None:
        """See `Awaited`. Only `read` raises: the transfer may have been made for another cache."""
        self._found = None
        self.broken = self.broken or bool(said)

    def read(self, *others: Awaited) -> None:
        """Read the findings, and what `others` wait for, with one synchronisation; none if nothing is pending.

        Raises:
            ValueError: if there is a finding, or was one since the last reset.
        """
        if self._found is not None or others:
            bring(self, *others)
        if self.broken:
            raise ValueError(
                "an earlier call gave this cache keys or values that are NaN or infinite, or its memory such tokens, and it "
                "holds what came of them: look for the call whose logits are not finite, and call cache.reset()"
            )

    def reset(self) -> None:
        """Clear the findings, for a cache that was reset."""
        self.broken, self._found = False, None


def finite_only(x: Tensor, message: str, check: FiniteCheck | None) -> Tensor:
    """Check that all numbers of `x` are finite, and return it; where that is reported later, with zeros for those that are not.

    Args:
        x: tensor of any shape.
        message: message of the error.
        check: receives the finding on devices where it defers them; None: it is refused at once.

    Raises:
        ValueError: if one is not finite and that is known at once.
    """
    finite = x.isfinite()
    if check is not None and check.defers(x.device):
        check.add(~finite.all())
        return x.masked_fill(~finite, 0)
    if not finite.all():
        raise ValueError(message)
    return x
