"""Small models whose first token is an attention sink, and the same models without."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def make(sink: bool, vocabulary: int = 257, bos: int = 0) -> Any:
    """Make a Llama of two layers with random weights in evaluation mode.

    Args:
        sink: whether the key of `bos` has a component that all queries match, so that it gets most of their attention.
        vocabulary: number of tokens.
        bos: the token that becomes the sink; it must be the first of a text.
    """
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        bos_token_id=bos,
        eos_token_id=None,
        initializer_range=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = LlamaForCausalLM(config).eval()
    if not sink:
        return model
    with torch.no_grad():
        # Two channels of the residual stream are reserved: one marks every token, the other the first token.
        model.model.embed_tokens.weight[:, :2] = torch.tensor([1.0, 0.0])
        model.model.embed_tokens.weight[bos, :2] = torch.tensor([1.0, 8.0])
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:2] = 0
            layer.mlp.down_proj.weight[:2] = 0
            attention = layer.self_attn
            # The slowest pair of the rotary embedding hardly rotates, so distance does not matter.
            for weight, channel, size in ((attention.q_proj.weight, 0, 4.0), (attention.k_proj.weight, 1, 4.0)):
                for head in range(weight.shape[0] // 32):
                    weight[head * 32 + 15] = 0
                    weight[head * 32 + 15, channel] = size
    return model
