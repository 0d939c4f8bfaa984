"""Tensor Cache: pairs that leave a window of attention are absorbed by a matrix per head, which later queries read."""

from __future__ import annotations

from tessera.associative.config import TensorCacheConfig
from tessera.associative.memory import TensorCache
from tessera.associative.state import TensorCacheState

__all__ = ["TensorCache", "TensorCacheConfig", "TensorCacheState"]
