"""Models to train: a language model, a vision transformer, and backbones for the diagnostics."""

from tessera.lab.models.small_gpt import GPT, GPTConfig
from tessera.lab.models.vit import ViT, ViTConfig

__all__ = ["GPT", "GPTConfig", "ViT", "ViTConfig"]
