"""`GPT`: a small language model to train, whose attention is chosen by a spec.

Everything but the attention is transformers' Llama: rotary positions, RMSNorm, SwiGLU, grouped key heads.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tessera import grammar
from tessera.adapters import install
from tessera.attention import SlidingWindow, enable
from tessera.tensor_cache.gated_read import TensorCacheLayer
from tessera.tensor_cache.infini import Infini
from tessera.tensor_cache.rotary import Phase
from tessera.tensor_cache.tensor_cache_config import TensorCacheConfig
from tessera.tiers.spec import parse


class GPTConfig(LlamaConfig):
    """A Llama's configuration with two fields more:

    Attributes:
        attention: "dense", "window:W", "sink:S + window:W", "infini:W" or "window:W + tc" (with or without "sink:S").
        memory: fields of `TensorCacheConfig` for "tc", without window and sink.
    """

    model_type = "tessera_gpt"

    def __init__(self, attention: str = "dense", memory: dict[str, Any] | None = None, **fields: Any) -> None:
        read_attention(attention, memory)  # errors are raised here rather than in the model
        self.attention = attention
        self.memory = memory
        super().__init__(**fields)


class GPT(LlamaForCausalLM):
    """A causal language model: `generate`, `save_pretrained`, `from_pretrained`, the Auto classes."""

    config_class = GPTConfig
    # In half precision a slow decay would round to none.
    _keep_in_fp32_modules_strict = ["tensor_cache.memory"]  # noqa: RUF012

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        limits, memory, segment = read_attention(config.attention, config.memory)
        enable(self)
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        layers = {}
        for index, layer in enumerate(self.model.layers):
            phase = Phase(self.model.rotary_emb, None)
            if segment is not None:
                layer.self_attn.infini = Infini(segment, heads)
                layer.self_attn.infini_phase = (phase,)
            elif memory is not None:
                plain = None if memory.rotary else phase
                layers[index] = TensorCacheLayer(memory, heads, kv_heads, dim, config.hidden_size, plain)
            elif limits is not None:
                layer.self_attn.limits = limits
        if memory is not None:
            install(self, memory, layers, [layer.self_attn for layer in self.model.layers])


def read_attention(
    text: str, memory: dict[str, Any] | None = None
) -> tuple[SlidingWindow | None, TensorCacheConfig | None, int | None]:
    """Parse the spec of a GPT's attention: window and sinks, the memory behind them, or the segment of Infini-attention.

    Raises:
        ValueError: naming what is wrong with it.
    """
    if text.strip().startswith("infini"):
        return None, None, grammar.one(text, {"infini": "infini:64"})[1]
    spec = parse(text)
    if spec.codec is not None:
        raise ValueError(f"{text!r}: a codec is for caches, not for training; choose dense, window, sink, infini or tc")
    if memory and not spec.tensor_cache:
        raise ValueError(f"a memory is given for {text!r}, which has none; add 'tc'")
    if spec.window is None:
        return None, None, None
    limits = SlidingWindow(spec.window, spec.sink)
    if not spec.tensor_cache:
        return limits, None, None
    return limits, TensorCacheConfig.from_dict({**(memory or {}), "window": spec.window, "sink": spec.sink}), None


AutoConfig.register(GPTConfig.model_type, GPTConfig)
AutoModelForCausalLM.register(GPTConfig, GPT)
