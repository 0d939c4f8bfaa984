"""The name of `tessera.tensor_memory` in version 0.1."""

from tessera.tensor_memory import TensorMemory, TensorMemoryConfig, TensorMemoryState

__all__ = ["TensorMemory", "TensorMemoryConfig", "TensorMemoryState"]
