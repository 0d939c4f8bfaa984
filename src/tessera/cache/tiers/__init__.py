"""The tiers that a cache is made of, one a file, and the words of the grammar for those that are added to it."""

from tessera.cache.tiers.exact import ExactTier, RecentTier, SinkTier
from tessera.cache.tiers.quantized import PAGE, QuantizedTier
from tessera.cache.tiers.tensor_cache_tier import TensorCacheTier
from tessera.cache.tiers.tier import BLOCK, KVSource, Pairs, Tier

__all__ = [
    "BLOCK",
    "PAGE",
    "ExactTier",
    "KVSource",
    "Pairs",
    "QuantizedTier",
    "RecentTier",
    "SinkTier",
    "TensorCacheTier",
    "Tier",
]
