"""In streams far longer than the cache, memory does not grow and results stay finite."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tessera
from tessera.tensor_cache import TensorCacheConfig
from tessera.tensor_memory import TensorMemoryConfig

TOKENS, WARM, CALL = 200_000, 50_000, 500
#: Tokens between two measurements of memory.
LOOK = 5_000
#: Maximum growth of the process in bytes after the first `WARM` tokens.
GROWTH = 8 << 20


def nothing(model: Any) -> Any:
    return model


def tensor_cache(model: Any) -> Any:
    tessera.attach(model, TensorCacheConfig(window=256, sink=4))
    for layer in model.modules():
        if type(layer).__name__ == "TensorCacheLayer":
            torch.nn.init.normal_(layer.out.weight, std=0.3)
    return model


def tensor_memory(model: Any) -> Any:
    tessera.attach(model, TensorMemoryConfig(channels=4, grid=(3, 3, 3), chunk=2))
    torch.nn.init.normal_(model.tensor_memory["shared"].out_proj.weight, std=0.5)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "attach"),
    [
        ("sink:4 + window:256", nothing),
        ("sink:4 + hqmq:3@1024 + recent:64", nothing),
        ("sink:4 + window:256 + tc", tensor_cache),
        ("sink:4 + window:256", tensor_memory),
        ("sink:4 + hqmq:3@1024 + recent:64", tensor_memory),
    ],
    ids=["window", "packed", "window, Tensor Cache", "window, Tensor Memory", "packed, Tensor Memory"],
)
@torch.no_grad()
def test_memory_is_flat_and_outputs_are_finite_over_a_long_stream(spec: str, attach: Callable[[Any], Any]) -> None:
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, num_key_value_heads=1, head_dim=16, initializer_range=0.2, max_position_embeddings=TOKENS)
    model = attach(LlamaForCausalLM(config).eval())
    cache = tessera.Cache(spec, model)
    process, held, resident = psutil.Process(), [], []
    while cache.get_seq_length() < TOKENS:
        # A long call and a step, as of a prompt and of generation.
        for count in (CALL - 1, 1):
            logits = model(torch.randint(97, (1, count)), past_key_values=cache, logits_to_keep=8).logits
            assert logits.isfinite().all(), cache.get_seq_length()
        if cache.get_seq_length() >= WARM and cache.get_seq_length() % LOOK == 0:
            gc.collect()
            held.append(cache.report().nbytes)
            resident.append(process.memory_info().rss)
    # Packing in groups makes the cache's size vary, but within its range during warm-up.
    few = len(held) // 4
    assert max(held[-few:]) <= max(held[:few])
    # The minimum of many measurements, since temporary memory of calls varies too.
    assert min(resident[-few:]) - min(resident[:few]) < GROWTH, [size >> 20 for size in resident[::10]]
