"""Tensor Memory: a recurrent grid of fixed size that tokens write to and read from at continuous places."""

from __future__ import annotations

from tessera.spatial.config import TensorMemoryConfig
from tessera.spatial.memory import TensorMemory
from tessera.spatial.state import TensorMemoryState

__all__ = ["TensorMemory", "TensorMemoryConfig", "TensorMemoryState"]
