"""Storage for whole pages of quantised tokens outside the memory of the model's device: the CPU's memory, or files.

Attention to them runs where they are stored, and only a partial result is transferred: an output and a log-sum-exp for each
query. So a context may be longer than a GPU's memory at the price of the CPU's bandwidth, or longer than the CPU's memory at
that of the disk's, whose pages the operating system reads and evicts.
"""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tessera.codecs import Packed

#: Bytes that a tensor in a file is aligned to.
ALIGNED = 64


class Store(ABC):
    """A store of pages, which never change."""

    @abstractmethod
    def holds(self, packed: Packed) -> bool:
        """Whether a page is already in this store."""

    @abstractmethod
    def keep(self, packed: Packed) -> Packed:
        """Return the same page, in this store."""

    def __deepcopy__(self, memo: object) -> Store:
        return self


class InMemory(Store):
    """The memory of the CPU, for models on another device."""

    def holds(self, packed: Packed) -> bool:
        """See `Store`."""
        return packed.device.type == "cpu"

    def keep(self, packed: Packed) -> Packed:
        """See `Store`."""
        return packed.to("cpu")


class InFiles(Store):
    """Files in a folder, mapped into memory; each is deleted as soon as it is mapped, so that none is left behind.

    Args:
        folder: on the disk that is to hold them, and which must be there.

    Raises:
        FileNotFoundError: if it is not.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not os.fspath(folder) or not self.folder.is_dir():
            raise FileNotFoundError(f"there is no folder {os.fspath(folder)!r} for the pages of a cache; make it first")

    def holds(self, packed: Packed) -> bool:
        """See `Store`."""
        return all(mapped(tensor) for tensor in packed.tensors.values())

    def keep(self, packed: Packed) -> Packed:
        """See `Store`."""
        places, size = {}, 0
        for name, tensor in packed.tensors.items():
            places[name] = size
            size += -(-tensor.numel() * tensor.element_size() // ALIGNED) * ALIGNED
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix="tessera-pages-", delete=False) as file:
            try:
                for name, tensor in packed.tensors.items():
                    file.seek(places[name])
                    file.write(_bytes(tensor).numpy().tobytes())
                file.truncate(max(size, 1))
                file.flush()
                whole = torch.from_file(file.name, shared=True, size=max(size, 1), dtype=torch.uint8)
            finally:
                os.unlink(file.name)
        tensors = {
            name: whole[at : at + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
            for (name, tensor), at in zip(packed.tensors.items(), places.values(), strict=True)
        }
        return replace(packed, tensors=tensors)


def mapped(tensor: Tensor) -> bool:
    """Whether a tensor is mapped from a file."""
    return tensor.device.type == "cpu" and tensor.untyped_storage().filename is not None


def store(where: str | os.PathLike[str] | None) -> Store | None:
    """Make the store for "cpu" or for a folder; None: pages stay where the model computes.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    if where is None:
        return None
    return InMemory() if where == "cpu" else InFiles(where)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
