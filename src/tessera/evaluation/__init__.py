"""Measuring caches on real models: perplexity, divergence, bytes and speed, in one result record."""

from tessera.evaluation.compare import compare
from tessera.evaluation.records import Comparison, Row

__all__ = ["Comparison", "Row", "compare"]
