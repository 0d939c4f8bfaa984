"""Whether what a cache or a memory takes in is finite: looked at where it is, and told to the host with its one look at a call.

On a GPU every finding is added to a flag on the device, numbers that are not finite are taken for zeros, and the flag is read
when the next call begins, together with that call's mask (`tessera.readback`). On a CPU there is nothing to wait for, and a
finding is refused at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.readback import Awaited, bring, note


class FiniteCheck(Awaited):
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
        note(self)

    def pending(self) -> Tensor | None:
        """See `Awaited`."""
        return self._found

    def receive(self, said: NDArray[np.generic]) -> None:
        """See `Awaited`. It is told by `read`: others may have read it along, whom it does not concern."""
        self._found = None
        self.broken = self.broken or bool(said)

    def read(self, *others: Awaited) -> None:
        """Look now, at the price of a synchronisation if there is something to be read, here or of `others`.

        Raises:
            ValueError: if something was not finite.
        """
        if self._found is not None or others:
            bring(self, *others)
        if self.broken:
            raise ValueError(
                "an earlier call gave this cache keys or values that are NaN or infinite, or its memory such tokens, and it "
                "holds what came of them: look for the call whose logits are not finite, and call cache.reset()"
            )

    def reset(self) -> None:
        """The cache has forgotten all that it held."""
        self.broken, self._found = False, None



def finite_only(x: Tensor, message: str, check: FiniteCheck | None) -> Tensor:
    """`x`, of which all numbers must be finite; where that is told later, with zeros in place of those that are not.

    Args:
        x: to be looked at.
        message: of the error.
        check: is told what is found where it defers that; None: it is refused at once.

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
