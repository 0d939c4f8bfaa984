"""Tessera's attention: one softmax over all tiers of a cache, registered with transformers as "tessera"."""

from tessera.attention.documents import SlidingWindow
from tessera.attention.forward import attention_forward, mask_unless_causal
from tessera.attention.switch import disable, enable, restore, unsupported, using

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
