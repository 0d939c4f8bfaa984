"""Tensor Cache: a matrix per head that absorbs the pairs which leave a window of attention, for later queries to read."""

from __future__ import annotations

from tessera.tensor_cache.config import TensorCacheConfig
from tessera.tensor_cache.state import TensorCacheState
from tessera.tensor_cache.tensor_cache import TensorCache

__all__ = ["TensorCache", "TensorCacheConfig", "TensorCacheState"]
