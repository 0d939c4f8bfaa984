"""The state of a Tensor Cache: what a stream carries from one call to the next."""

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
class TensorCacheState:
    """A value: methods return a new one.

    Attributes:
        a: (batch, heads · slots, head_dim, head_dim) float32, the matrices.
        slow: of the same shape, the second timescale, or None.
        z: (batch, heads · slots, head_dim, 1) float32, sums of keys, or None.
        k, v: (batch, heads, n, head_dim), the newest n <= window pairs, which have not been written yet.
        live: (batch, n) bool, which of them will be: not padding and not sinks.
        seen: (batch,) int64, tokens of each row so far, padding not counted.
    """

    a: Tensor
    slow: Tensor | None
    z: Tensor | None
    k: Tensor
    v: Tensor
    live: Tensor
    seen: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """All that there is, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def detach(self) -> TensorCacheState:
        """The same without a graph."""
        return replace(self, **{name: tensor.detach() for name, tensor in self.tensors().items()})

    def to(self, device: torch.device | str) -> TensorCacheState:
        """The same on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def select(self, rows: Tensor) -> TensorCacheState:
        """Row i of the new batch is row rows[i] of this one. rows: (n,) int64."""
        return replace(
            self, **{name: tensor.index_select(0, rows.to(tensor.device)) for name, tensor in self.tensors().items()}
        )

    def reset(self, rows: Tensor) -> TensorCacheState:
        """The rows that `rows`, (batch,) bool, marks begin anew."""
        if rows.shape != self.seen.shape or rows.dtype != torch.bool:
            raise ValueError(f"reset takes {len(self.seen)} booleans, got {rows.dtype} of shape {tuple(rows.shape)}")
        mark = rows.to(self.a.device)
        # Pairs of such rows stay in their slots and are never written.
        return replace(
            self,
            **{
                name: tensor.masked_fill(mark.view(-1, *[1] * (tensor.ndim - 1)), 0)
                for name, tensor in self.tensors().items()
                if name not in ("k", "v")
            },
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file."""
        with atomic_path(path) as temporary:
            save_file(
                {name: tensor.detach().contiguous() for name, tensor in self.tensors().items()},
                temporary,
                {"tessera": "tensor_cache_state"},
            )

    @staticmethod
    def load(path: str | os.PathLike[str]) -> TensorCacheState:
        """Read what `save` wrote.

        Raises:
            ValueError: if the file holds something else.
        """
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("tessera") != "tensor_cache_state":
                raise ValueError(f"{os.fspath(path)} holds no state of a Tensor Cache")
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        named: dict[str, Any] = {field.name: found.pop(field.name, None) for field in fields(TensorCacheState)}
        if found or any(tensor is None for name, tensor in named.items() if name not in ("slow", "z")):
            raise ValueError(f"{os.fspath(path)} is damaged: its tensors are not those of a state")
        return TensorCacheState(**named)
