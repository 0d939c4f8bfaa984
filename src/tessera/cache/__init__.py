"""The cache, whose tokens are first exact, then quantised, and at last dropped."""

from tessera.cache.cache import Cache, Prefill
from tessera.cache.per_layer import PerLayer
from tessera.cache.report import CacheReport
from tessera.cache.spec import Spec, parse
from tessera.cache.tiers import BLOCK

__all__ = ["BLOCK", "Cache", "CacheReport", "PerLayer", "Prefill", "Spec", "parse"]
