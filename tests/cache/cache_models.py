"""Small random-initialised models of the supported families."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 97
MIXED = ["sliding_attention", "full_attention"]

#: Ways to split a sequence into calls: a long first call, steps of one token, and a chunk in the middle.
CUTS = (170, 1, 1, 30, 1, 70, 1)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_GQA = {**_COMMON, "num_key_value_heads": 2, "head_dim": 16}

#: Name -> (config class, model class, arguments). Sliding windows are shorter than the sequences that tests use.
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, _GQA),
    "mistral": (MistralConfig, MistralForCausalLM, {**_GQA, "sliding_window": 80}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {**_COMMON, "num_key_value_heads": 2}),
    "qwen2-sliding": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {**_COMMON, "num_key_value_heads": 2, "layer_types": MIXED, "use_sliding_window": True, "sliding_window": 80},
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, _GQA),
    "phi3": (Phi3Config, Phi3ForCausalLM, {**_COMMON, "num_key_value_heads": 2, "sliding_window": None}),
    "phi3-sliding": (Phi3Config, Phi3ForCausalLM, {**_COMMON, "num_key_value_heads": 4, "sliding_window": 150}),
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        # Before 5.20 transformers chooses SDPA, which ignores soft-capping.
        {
            **_GQA,
            "layer_types": MIXED,
            "sliding_window": 40,
            "attn_logit_softcapping": 2.0,
            "query_pre_attn_scalar": 4,
            "attn_implementation": "eager",
        },
    ),
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {**_GQA, "layer_types": MIXED, "sliding_window": 40, "query_pre_attn_scalar": 16},
    ),
    "gpt-oss": (
        GptOssConfig,
        GptOssForCausalLM,
        {**_GQA, "layer_types": MIXED, "sliding_window": 40, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt-neox": (GPTNeoXConfig, GPTNeoXForCausalLM, _COMMON),
}


def make(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Make a model in evaluation mode, with weights large enough for attention to matter."""
    config_class, model_class, arguments = FAMILIES[family]
    config = config_class(**{**arguments, "initializer_range": 0.1, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return model_class(config).eval().to(dtype)


def tokens(rows: int, count: int) -> torch.Tensor:
    """Draw (rows, count) random tokens that are neither padding nor the end."""
    return torch.randint(3, VOCAB, (rows, count))


@torch.no_grad()
def logits(
    model: Any,
    cache: Any,
    ids: torch.Tensor,
    cuts: tuple[int, ...] = CUTS,
    mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Return the logits of all positions for these calls. mask: (rows, slots), 0 for padding, for all slots up to the last."""
    out = []
    start = 0 if mask is None else mask.shape[1] - ids.shape[1]
    for part in ids.split(list(cuts), dim=1):
        if mask is not None:
            stop = start + part.shape[1]
            positions = (mask[:, :stop].cumsum(-1) - 1).clamp(min=0)[:, start:]
            kwargs |= {"attention_mask": mask[:, :stop], "position_ids": positions}
            start = stop
        out.append(model(part, past_key_values=cache, use_cache=True, **kwargs).logits)
    return torch.cat(out, dim=1).float()


def padding(pads: tuple[int, ...], count: int) -> torch.Tensor:
    """Return a mask of `count` slots for rows that begin with these lengths of padding."""
    return (torch.arange(count) >= torch.tensor(pads)[:, None]).long()


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the root mean square error relative to the root mean square of the expected values."""
    return float(((found - wanted).square().mean() / wanted.square().mean()).sqrt())
