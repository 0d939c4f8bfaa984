"""Measurement of caches on real models: perplexity, divergence, bytes and speed, in one result record."""

from tessera.evaluation.comparison import compare
from tessera.evaluation.loading import Source, load, read_text
from tessera.evaluation.records import Comparison, Row, load_all, save_all

__all__ = ["Comparison", "Row", "Source", "compare", "load", "load_all", "read_text", "save_all"]
