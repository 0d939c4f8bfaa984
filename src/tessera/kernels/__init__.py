"""Kernels: attention over packed keys and values."""

from tessera.kernels.reference import attend, merge

__all__ = ["attend", "merge"]
