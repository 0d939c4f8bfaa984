"""The tiers that a cache is made of, the chain that joins them, and the specification that names them."""

from tessera.tiers.exact import ExactTier, RecentTier, SinkTier
from tessera.tiers.quantized import PAGE, QuantizedTier
from tessera.tiers.tensor_cache_tier import TensorCacheTier
from tessera.tiers.tier import BLOCK, KVSource, Pairs, Tier

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
