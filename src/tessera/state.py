"""The base class of streams' states: immutable values made of tensors whose first dimension is the batch."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from tessera.devices import upload
from tessera.files import atomic_path, brief, open_tensors

S = TypeVar("S", bound="State")

#: Dtypes that keys and values of a model may have.
MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class State:
    """An immutable state: methods return a new one. Fields are tensors (batch, ...), or None for optional ones.

    Attributes:
        OWNER: name of the module that the state belongs to, for messages.
        KIND: kind of its files, in their headers.
        OPTIONAL: fields that may be None.
        UNMARKED: fields that `reset` does not change.
        DTYPES: dtypes of the fields that are not always float32.
    """

    OWNER: ClassVar[str]
    KIND: ClassVar[str]
    OPTIONAL: ClassVar[frozenset[str]] = frozenset()
    UNMARKED: ClassVar[frozenset[str]] = frozenset()
    DTYPES: ClassVar[dict[str, tuple[torch.dtype, ...]]] = {}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def detach(self: S) -> S:
        """Return the same state detached from the graph."""
        return replace(self, **{name: tensor.detach() for name, tensor in self.tensors().items()})

    def to(self: S, device: torch.device | str) -> S:
        """Return the same state on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def select(self: S, rows: Tensor) -> S:
        """Row i of the new batch is row rows[i] of this one. rows: (n,) int64."""
        return replace(
            self, **{name: tensor.index_select(0, upload(rows, tensor.device)) for name, tensor in self.tensors().items()}
        )

    def reset(self: S, rows: Tensor) -> S:
        """Return the state with the rows marked by `rows`, (batch,) bool, reset to the beginning."""
        tensors = self.tensors()
        first = next(iter(tensors.values()))
        if rows.shape != first.shape[:1] or rows.dtype != torch.bool:
            raise ValueError(f"reset takes {len(first)} booleans, got {rows.dtype} of shape {tuple(rows.shape)}")
        mark = upload(rows, first.device)
        return replace(
            self,
            **{
                name: tensor.masked_fill(mark.view(-1, *[1] * (tensor.ndim - 1)), 0)
                for name, tensor in tensors.items()
                if name not in self.UNMARKED
            },
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file."""
        tensors = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in self.tensors().items()
        }
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, {"tessera": self.KIND})

    @classmethod
    def load(cls: type[S], path: str | os.PathLike[str]) -> S:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file holds something else, or a state that no stream can continue.
        """
        with open_tensors(path, f"holds no state of {cls.OWNER}") as file:
            if file.metadata.get("tessera") != cls.KIND:
                raise ValueError(f"{os.fspath(path)} holds no state of {cls.OWNER}")
            found = {name: file.get(name) for name in file.names}
        named: dict[str, Any] = {field.name: found.pop(field.name, None) for field in fields(cls)}
        if found or any(tensor is None for name, tensor in named.items() if name not in cls.OPTIONAL):
            raise ValueError(f"{os.fspath(path)} is damaged: its tensors are not those of a state")
        state = cls(**named)
        try:
            state.check()
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} is damaged: {brief(error)}") from None
        return state

    def check(self) -> None:
        """Check what does not depend on the module that the state belongs to.

        Raises:
            ValueError: if there are tensors without rows or of different numbers of them, of another dtype than they can have,
                or with numbers that are not finite.
        """
        tensors = self.tensors()
        rows = {name: tensor.shape[0] if tensor.ndim else None for name, tensor in tensors.items()}
        if None in rows.values() or len(set(rows.values())) != 1:
            raise ValueError(f"all tensors of a state have as many rows, got {rows}")
        for name, tensor in tensors.items():
            wanted = self.DTYPES.get(name, (torch.float32,))
            if tensor.dtype not in wanted:
                raise ValueError(f"{name} must be in {' or '.join(map(str, wanted))}, got {tensor.dtype}")
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(f"{name} must be finite")

    def check_shapes(self, **wanted: tuple[int, ...]) -> None:
        """Refuse fields that are present but have other shapes.

        Raises:
            ValueError: naming the field, its shape and what it would be.
        """
        for name, shape in wanted.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name} of {tuple(tensor.shape)} does not fit the others: it would be {shape}")
