"""A model with rescaled keys, as the benchmarks of real models use it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from rescaled_keys import rescale


def test_rescaled_keys_change_nothing_but_what_a_cache_sees() -> None:
    """This includes models with biases and grouped heads; models that normalise queries and keys are refused."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.normal_(0, 3)
        ids = torch.arange(40)[None]
        before, width = model(ids).logits, model.model.layers[0].self_attn.k_proj.weight.norm(dim=1)
        rescale(model)
        after, wider = model(ids).logits, model.model.layers[0].self_attn.k_proj.weight.norm(dim=1)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    ratio = wider / width
    assert ratio.max() / ratio.min() > 5
    torch.testing.assert_close(ratio.view(2, 2, 4)[:, 0], ratio.view(2, 2, 4)[:, 1])  # both channels of a rotary pair
    with pytest.raises(ValueError, match="normalises"):
        rescale(Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, head_dim=8)))
