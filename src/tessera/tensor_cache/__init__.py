"""Tensor Cache: a matrix per head that absorbs the pairs which leave a window of attention, for later queries to read."""

from __future__ import annotations

from tessera.tensor_cache.tensor_cache import TensorCache
from tessera.tensor_cache.tensor_cache_config import TensorCacheConfig
from tessera.tensor_cache.tensor_cache_state import TensorCacheState

__all__ = ["TensorCache", "TensorCacheConfig", "TensorCacheState"]
