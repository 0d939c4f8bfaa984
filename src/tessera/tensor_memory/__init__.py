"""Tensor Memory: a recurrent grid of fixed size that tokens write to and read from at continuous places."""

from __future__ import annotations

from tessera.tensor_memory.config import TensorMemoryConfig
from tessera.tensor_memory.state import TensorMemoryState
from tessera.tensor_memory.tensor_memory import TensorMemory

__all__ = ["TensorMemory", "TensorMemoryConfig", "TensorMemoryState"]
