"""The state of a Tensor Memory: what a stream carries from one call to the next."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tessera.files import atomic_path


@dataclass(frozen=True, eq=False)
class TensorMemoryState:
    """A value: methods return a new one.

    Attributes:
        h, c: (batch, channels, *grid) float32, hidden and cell.
        waiting: (batch, n, dim) float32, the newest n < chunk tokens, whose chunk is not whole and has not been written.
        places: (batch, n, axes) float32, where those are, for anchored coordinates; else None.
    """

    h: Tensor
    c: Tensor
    waiting: Tensor
    places: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All that there is, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def detach(self) -> TensorMemoryState:
        """The same without a graph."""
        return replace(self, **{name: tensor.detach() for name, tensor in self.tensors().items()})

    def to(self, device: torch.device | str) -> TensorMemoryState:
        """The same on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def select(self, rows: Tensor) -> TensorMemoryState:
        """Row i of the new batch is row rows[i] of this one. rows: (n,) int64."""
        return replace(
            self, **{name: tensor.index_select(0, rows.to(tensor.device)) for name, tensor in self.tensors().items()}
        )

    def reset(self, rows: Tensor) -> TensorMemoryState:
        """The rows that `rows`, (batch,) bool, marks begin anew.

        Chunks begin at the same token in all rows: where tokens wait, those of such a row become zeros.
        """
        if rows.shape != self.h.shape[:1] or rows.dtype != torch.bool:
            raise ValueError(f"reset takes {len(self.h)} booleans, got {rows.dtype} of shape {tuple(rows.shape)}")
        mark = rows.to(self.h.device)
        return replace(
            self,
            **{name: tensor.masked_fill(mark.view(-1, *[1] * (tensor.ndim - 1)), 0) for name, tensor in self.tensors().items()},
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file."""
        with atomic_path(path) as temporary:
            save_file(
                {name: tensor.detach().contiguous() for name, tensor in self.tensors().items()},
                temporary,
                {"tessera": "tensor_memory_state"},
            )

    @staticmethod
    def load(path: str | os.PathLike[str]) -> TensorMemoryState:
        """Read what `save` wrote.

        Raises:
            ValueError: if the file holds something else.
        """
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("tessera") != "tensor_memory_state":
                raise ValueError(f"{os.fspath(path)} holds no state of a Tensor Memory")
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        named: dict[str, Any] = {field.name: found.pop(field.name, None) for field in fields(TensorMemoryState)}
        if found or any(tensor is None for name, tensor in named.items() if name != "places"):
            raise ValueError(f"{os.fspath(path)} is damaged: its tensors are not those of a state")
        return TensorMemoryState(**named)
