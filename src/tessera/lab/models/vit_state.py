"""The state that a stream of frames through a `ViT` keeps from one call to the next."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from safetensors.torch import save_file
from torch import Tensor

from tessera.files import atomic_path, brief, open_tensors
from tessera.state import MODEL_DTYPES
from tessera.tensor_memory.tensor_memory_state import TensorMemoryState

_KIND = "vit_state"
#: No stream has seen more frames.
MOST = 1 << 40


@dataclass(frozen=True, eq=False)
class ViTState:
    """An immutable state: methods return a new one.

    Attributes:
        frames: number of frames so far.
        windows: keys and values of each layer, (batch, heads, patches of the frames in the window, head_dim).
        memories: for each layer the state of its memory, or None.
    """

    frames: int
    windows: tuple[tuple[Tensor, Tensor], ...]
    memories: tuple[TensorMemoryState | None, ...]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by name: ``0.k`` and ``0.v`` of the first layer, ``0.memory.h`` of its memory."""
        found: dict[str, Tensor] = {}
        for layer, ((k, v), memory) in enumerate(zip(self.windows, self.memories, strict=True)):
            found |= {f"{layer}.k": k, f"{layer}.v": v}
            if memory is not None:
                found |= {f"{layer}.memory.{name}": x for name, x in memory.tensors().items()}
        return found

    def _map(self, change: Callable[[Tensor], Tensor]) -> ViTState:
        windows = tuple((change(k), change(v)) for k, v in self.windows)
        memories = tuple(
            None if m is None else replace(m, **{name: change(x) for name, x in m.tensors().items()}) for m in self.memories
        )
        return ViTState(self.frames, windows, memories)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.numel() * x.element_size() for x in self.tensors().values())

    def detach(self) -> ViTState:
        """Return the same state detached from the graph."""
        return self._map(lambda x: x.detach())

    def to(self, device: torch.device | str) -> ViTState:
        """Return the same state on another device."""
        return self._map(lambda x: x.to(device))

    def select(self, rows: Tensor) -> ViTState:
        """Stream i is stream rows[i] of this one. rows: (n,) int64."""
        return self._map(lambda x: x.index_select(0, rows.to(x.device)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file."""
        tensors = {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in self.tensors().items()}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, {"tessera": _KIND, "frames": str(self.frames)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ViTState:
        """Read what `save` wrote; whether it fits a model is checked when it is used.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file holds something else.
        """
        with open_tensors(path, "holds no state of a ViT") as file:
            about = file.metadata
            found = {name: file.get(name) for name in file.names}
        if about.get("tessera") != _KIND:
            raise ValueError(f"{os.fspath(path)} holds no state of a ViT")
        windows: list[tuple[Tensor, Tensor]] = []
        memories: list[TensorMemoryState | None] = []
        try:
            while f"{len(windows)}.k" in found:
                layer = len(windows)
                windows.append((found.pop(f"{layer}.k"), found.pop(f"{layer}.v")))
                own = {f.name: found.pop(f"{layer}.memory.{f.name}", None) for f in fields(TensorMemoryState)}
                present = {name: x for name, x in own.items() if x is not None}
                memories.append(TensorMemoryState(**present) if present else None)
            state = cls(int(about["frames"]), tuple(windows), tuple(memories))
            if found or not windows or not 0 <= state.frames <= MOST:
                raise ValueError("its tensors are not those of a state")
            for memory in filter(None, state.memories):
                memory.check()
            for k, v in windows:
                if k.ndim != 4 or k.shape != v.shape or not {k.dtype, v.dtype} <= set(MODEL_DTYPES):
                    raise ValueError("keys and values of a window are of equal shape (batch, heads, patches, head_dim)")
            rows = {x.shape[0] for x in state.tensors().values()}
            if len(rows) != 1 or not all(x.isfinite().all() for x in state.tensors().values()):
                raise ValueError("all its tensors have as many rows and are finite")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)} is damaged: {brief(error)}") from None
        return state
