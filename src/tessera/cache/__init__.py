"""The cache, whose tokens are first exact, then quantised, and at last dropped."""

from tessera.cache.cache import Cache, Prefill
from tessera.cache.report import CacheReport
from tessera.cache_layers.truncated_bptt import TruncatedBPTTCache
from tessera.tiers import BLOCK
from tessera.tiers.per_layer import PerLayer
from tessera.tiers.spec import Spec, parse

__all__ = ["BLOCK", "Cache", "CacheReport", "PerLayer", "Prefill", "Spec", "TruncatedBPTTCache", "parse"]
