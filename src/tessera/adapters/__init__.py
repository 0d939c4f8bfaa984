"""Memories for pretrained models: attaching, training with the model frozen, saving them alone, detaching."""

from __future__ import annotations

from tessera.adapters.add_tensor_cache import attention_modules, install
from tessera.adapters.apply import attach, detach, load_memory, memory_parameters, save_memory
from tessera.adapters.attached import AttachedMemory, attached_memory, reading, tensor_cache

__all__ = [
    "AttachedMemory",
    "attach",
    "attached_memory",
    "attention_modules",
    "detach",
    "install",
    "load_memory",
    "memory_parameters",
    "reading",
    "save_memory",
    "tensor_cache",
]
