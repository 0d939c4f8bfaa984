"""The name of `tessera.tensor_cache` in version 0.1."""

from tessera.tensor_cache import TensorCache, TensorCacheConfig, TensorCacheState

__all__ = ["TensorCache", "TensorCacheConfig", "TensorCacheState"]
