"""Tensor Cache: pairs that leave a window of attention are absorbed by a matrix per head, which later queries read."""

from __future__ import annotations

from tessera.tensor_cache.config import TensorCacheConfig
from tessera.tensor_cache.module import TensorCache
from tessera.tensor_cache.state import TensorCacheState

__all__ = ["TensorCache", "TensorCacheConfig", "TensorCacheState"]
