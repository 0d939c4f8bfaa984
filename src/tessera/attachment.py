"""The name of `tessera.adapters` in version 0.1."""

from tessera.adapters import attach, detach, load_memory, memory_parameters, save_memory

__all__ = ["attach", "detach", "load_memory", "memory_parameters", "save_memory"]
