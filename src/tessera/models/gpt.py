"""The name that `tessera.lab.models.small_gpt` had in version 0.1."""

from __future__ import annotations

from tessera.models import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig"]
