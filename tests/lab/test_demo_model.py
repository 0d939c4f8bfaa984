"""The demo model loads from the package alone, has the loss that its card states, and uses its context."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tessera.lab.evaluation.context_use import copy_far_name, loss_by_context
from tessera.models import demo_path, heldout_text, load_demo

try:
    PATH = demo_path()
except FileNotFoundError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def demo() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        return load_demo()


@pytest.fixture(scope="module")
def tokens(demo: Any) -> torch.Tensor:
    _, tokenizer = demo
    return tokenizer(heldout_text(120_000), return_tensors="pt").input_ids[0]


def test_files_are_small_and_hold_no_pickle() -> None:
    sizes = {file.name: file.stat().st_size for file in PATH.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"} <= sizes.keys()
    assert sum(sizes.values()) < 16 * 2**20
    assert all(size < 2**20 for name, size in sizes.items() if name not in ("model.safetensors", "memory.safetensors"))
    assert {Path(name).suffix for name in sizes} <= {".safetensors", ".json", ".md", ".txt"}


def test_shape_is_one_that_larger_models_have(demo: Any) -> None:
    model, _ = demo
    config = json.loads((PATH / "config.json").read_text())
    assert config["head_dim"] == 64
    assert config["num_attention_heads"] > config["num_key_value_heads"] > 1
    assert config["max_position_embeddings"] >= 2048
    assert 4e6 < sum(p.numel() for p in model.parameters()) < 12e6


def test_tokenizer_gives_back_what_it_was_given(demo: Any) -> None:
    _, tokenizer = demo
    for text in ("def f(x):\n\treturn x  # ünïcode 文\n", heldout_text(5_000)):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_predicts_modules_it_never_saw(demo: Any, tokens: torch.Tensor) -> None:
    model, _ = demo
    result = loss_by_context(model, tokens, long_context=512, short_context=2, scored=512, windows=8)
    assert math.exp(result.long) < 6.6


def test_long_context_lowers_the_loss(demo: Any, tokens: torch.Tensor) -> None:
    model, _ = demo
    result = loss_by_context(model, tokens, long_context=1024, short_context=128, scored=128, windows=16)
    assert result.gain > 0.05, result


def test_copies_a_name_from_far_back(demo: Any, tokens: torch.Tensor) -> None:
    model, tokenizer = demo
    result = copy_far_name(model, tokenizer, tokens[1:], distance=500, trials=16)
    assert result.gain > 1.0, result
    assert result.top1_defined > result.top1_control + 0.2, result


def test_generates_the_same_with_and_without_a_cache(demo: Any) -> None:
    model, tokenizer = demo
    inputs = tokenizer("class Stack:\n    def __init__(self):\n", return_tensors="pt")
    settings = {"max_new_tokens": 24, "do_sample": False}
    with_cache = model.generate(**inputs, **settings)
    without = model.generate(**inputs, **settings, use_cache=False)
    assert torch.equal(with_cache, without)


def test_too_short_texts_are_refused(demo: Any) -> None:
    model, tokenizer = demo
    with pytest.raises(ValueError, match="too few"):
        loss_by_context(model, torch.zeros(100, dtype=torch.long))
    with pytest.raises(ValueError, match="short < long"):
        loss_by_context(model, torch.zeros(5000, dtype=torch.long), long_context=64, short_context=128)
    with pytest.raises(ValueError, match="fewer than the distance"):
        copy_far_name(model, tokenizer, torch.zeros(100, dtype=torch.long))
