"""Write a small Llama of transformers as a GGUF file, as llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, TokenType

#: Names of a layer's weights in transformers and in a GGUF file.
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write(model: Any, tokenizer: Any, path: Path) -> None:
    """Write a `LlamaForCausalLM` and a byte-level tokenizer without merges, in float32."""
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    # transformers requires a merge; this one joins bytes that never occur in UTF-8.
    tokens[tokens.index("ÿ")] = "ĀĀ"
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token == "<s>" else TokenType.NORMAL for token in tokens])
    writer.add_token_merges(["Ā Ā"])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_add_bos_token(True)
    state = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    writer.add_tensor("output.weight", state["lm_head.weight"])
    for layer in range(config.num_hidden_layers):
        for theirs, own in PARTS.items():
            weight = state[f"model.layers.{layer}.{theirs}.weight"]
            if own in ("attn_q", "attn_k"):
                weight = _interleaved(weight, config.head_dim)
            writer.add_tensor(f"blk.{layer}.{own}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder rows as llama.cpp does: a rotary pair is adjacent there, and half a head apart in transformers."""
    heads = weight.shape[0] // head_dim
    return np.ascontiguousarray(weight.reshape(heads, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(weight.shape))
