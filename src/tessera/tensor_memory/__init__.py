"""Tensor Memory: a recurrent grid of fixed size that tokens write to and read from at continuous places."""

from __future__ import annotations

from tessera.tensor_memory.tensor_memory import TensorMemory
from tessera.tensor_memory.tensor_memory_config import TensorMemoryConfig
from tessera.tensor_memory.tensor_memory_state import TensorMemoryState

__all__ = ["TensorMemory", "TensorMemoryConfig", "TensorMemoryState"]
