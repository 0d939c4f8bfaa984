"""Tessera's attention: one softmax over all tiers of a cache, registered with transformers as "tessera"."""

from tessera.attention.forward import attention_forward, mask_unless_causal
from tessera.attention.switch import disable, enable, restore, unsupported, using
from tessera.attention.windowed import SlidingWindow

__all__ = [
    "SlidingWindow",
    "attention_forward",
    "disable",
    "enable",
    "mask_unless_causal",
    "restore",
    "unsupported",
    "using",
]
