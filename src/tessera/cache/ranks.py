"""Tensor parallelism: the key heads of this process, and totals over all processes.

With `tp_plan="auto"` transformers spreads the heads of every layer over the processes of a group. A cache holds those of its
own process; masks and lengths are the same in all of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tessera.cache.report import CacheReport

Shape = tuple[int, int]
#: Names of projections that compute keys, alone or with others.
KEYS = ("k_proj", "qkv_proj", "query_key_value")


@dataclass(frozen=True)
class Ranks:
    """The processes that a model's heads are spread over.

    Attributes:
        index: rank of this process.
        size: how many there are.
        group: process group of `torch.distributed`; None in a copy that went through pickle.
    """

    index: int
    size: int
    group: Any = None

    def __str__(self) -> str:
        return f"{self.index} of {self.size}"

    def __deepcopy__(self, memo: object) -> Ranks:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index, "size": self.size, "group": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)

    def sum(self, report: CacheReport) -> CacheReport:
        """Add up the reports of all processes; every one of them has to call this.

        Raises:
            RuntimeError: if this is a copy that has lost its group.
        """
        from torch import distributed

        if self.group is None:
            raise RuntimeError("this cache was copied from another process; ask the cache that the model filled")
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, report, group=self.group)
        return CacheReport.total(found)


def ranks_of(model: nn.Module) -> Ranks | None:
    """Find the processes over which transformers has sharded a model's heads; None: the model is not sharded."""
    size = getattr(model, "_tp_size", None) or 1
    mesh = getattr(model, "_device_mesh", None)
    if size == 1 or mesh is None:
        return None
    if mesh.ndim > 1:
        mesh = mesh["tp"]
    return Ranks(mesh.get_local_rank(), size, mesh.get_group())


def heads_here(model: nn.Module, layers: Sequence[tuple[Shape, int | None]], ranks: Ranks) -> list[tuple[Shape, int | None]]:
    """Return the result of `read_config` with the number of heads of this process.

    Raises:
        ValueError: if the heads of a layer cannot be spread evenly.
    """
    plan: dict[str, str] = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None) or {}
    spread = set()
    for name, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int):
            keys = (f"{name}.{projection}" for projection in KEYS if hasattr(module, projection))
            spread |= {index for key in keys if "colwise" in (plan.get(key), plan.get(re.sub(r"\d+", "*", key)))}
    found = []
    for index, ((heads, dim), sliding) in enumerate(layers):
        if index in spread and heads % ranks.size:
            raise ValueError(
                f"tessera.Cache: the {heads} key heads of layer {index} cannot be spread evenly over {ranks.size} processes; "
                "use a number of processes that divides them"
            )
        found.append(((heads // ranks.size if index in spread else heads, dim), sliding))
    return found
