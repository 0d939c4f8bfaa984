"""Tessera: a bounded, compressed, persistent memory for Transformers."""

__version__ = "0.1.0"
