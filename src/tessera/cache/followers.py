"""Values that go along with a cache of any kind: whatever changes its rows changes theirs.

They are on the cache because that is what a caller passes on from call to call, copies and throws away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

#: Where a cache, ours or transformers', has them.
FOLLOWERS = "_tessera_followers"


class Follower(Protocol):
    """What goes along."""

    @property
    def batch(self) -> int:
        """Number of rows."""

    def select(self, rows: Tensor) -> None:
        """Row i of the new batch is row rows[i] of this one. rows: (n,) int64 on the CPU."""


F = TypeVar("F", bound=Follower)


class _Along:
    """A method of a cache that changes its rows, and those of its followers alike."""

    def __init__(self, cache: Any, name: str) -> None:
        self.cache, self.name = cache, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = getattr(type(self.cache), self.name)(self.cache, *args, **kwargs)
        given: Any = next(iter((*args, *kwargs.values())), None)
        for follower in getattr(self.cache, FOLLOWERS).values():
            rows = torch.arange(follower.batch)
            if self.name == "batch_repeat_interleave":
                follower.select(rows.repeat_interleave(given))
            else:
                follower.select(rows[torch.as_tensor(given).cpu()])
        return result


def follower(cache: Any, name: str, make: Callable[[], F]) -> F:
    """The value that goes along with `cache` under this name, made where there is none."""
    found: dict[str, F] | None = getattr(cache, FOLLOWERS, None)
    if found is None:
        found = {}
        setattr(cache, FOLLOWERS, found)
        for method in ("reorder_cache", "batch_repeat_interleave", "batch_select_indices"):
            if hasattr(type(cache), method):
                setattr(cache, method, _Along(cache, method))
    if name not in found:
        found[name] = make()
    return found[name]
