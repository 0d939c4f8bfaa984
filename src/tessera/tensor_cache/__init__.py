"""Tensor Cache: pairs that leave a window of attention are absorbed by a matrix per head, which later queries read."""

from __future__ import annotations

from tessera.tensor_cache.config import TensorCacheConfig
from tessera.tensor_cache.state import TensorCacheState
from tessera.tensor_cache.tensor_cache import TensorCache

__all__ = ["TensorCache", "TensorCacheConfig", "TensorCacheState"]
