"""Fields whose length depends on the data, which the host learns with its next transfer from the device.

To allocate such a field the host has to know how long it is, and to ask a device for that waits for all its work. So the field
is made when it is first read: mostly in a later call, which has transferred the length with what it reads anyway.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tessera.readback import HostCopy


class Fields(Mapping[str, Tensor]):
    """Tensors by name, of which some are made when they are first read.

    Args:
        known: those that there are.
        later: what makes the others.
    """

    def __init__(self, known: Mapping[str, Tensor], later: Mapping[str, Callable[[], Tensor]]) -> None:
        self._known, self._later = dict(known), dict(later)
        self._names = (*known, *later)

    @property
    def pending(self) -> bool:
        """Whether some are yet to be made."""
        return bool(self._later)

    def __getitem__(self, name: str) -> Tensor:
        make = self._later.pop(name, None)
        if make is not None:
            self._known[name] = make()
        return self._known[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Tensor]:
        return copy.deepcopy(dict(self), memo)


def pending(fields: Mapping[str, Tensor]) -> bool:
    """Whether some of the fields are yet to be made."""
    return isinstance(fields, Fields) and fields.pending


def marked(rows: Tensor, marks: Tensor) -> Callable[[], Tensor]:
    """Prepare the selection of rows, whose number the host does not know yet.

    Args:
        rows: (n, ...), n at least 1.
        marks: (n,) bool.

    Returns:
        what gives the marked rows, in their order. Until it is called, all rows are held.
    """
    number = marks.cumsum(0)
    count = HostCopy(number[-1:])
    # The rows that are not marked go to one behind the others.
    table = torch.cat((torch.empty_like(rows), rows[:1])).index_copy_(0, torch.where(marks, number - 1, len(rows)), rows)
    return lambda: table[: int(count.get()[0])].clone()
