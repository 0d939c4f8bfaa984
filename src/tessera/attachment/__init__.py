"""Memories of models that exist: added, trained with the model frozen, saved by themselves, taken away again."""

from __future__ import annotations

from tessera.attachment.apply import attach, detach, load_memory, memory_parameters, save_memory
from tessera.attachment.associative import attention_modules, plug
from tessera.attachment.record import Attachment, attachment, reading, tensor_cache

__all__ = [
    "Attachment",
    "attach",
    "attachment",
    "attention_modules",
    "detach",
    "load_memory",
    "memory_parameters",
    "plug",
    "reading",
    "save_memory",
    "tensor_cache",
]
