"""Generation of a pretrained model is measured with every kind of cache that there is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_a_small_model_is_measured(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    caches = ["DynamicCache", "sink:4 + hqmq:4 + recent:16"]
    command = [sys.executable, str(BENCHMARKS / "generation.py"), "--model", str(tmp_path / "model"), "--tokens", "300"]
    command += ["--chunk", "100", "--steps", "70", "--repeats", "1", "--caches", *caches, "--json", str(tmp_path / "made.json")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    made = json.loads((tmp_path / "made.json").read_text())
    assert [(row["cache"], row["tokens"], row["chunk"]) for row in made["rows"]] == [
        (cache, 300, chunk) for chunk in (300, 100) for cache in caches
    ]
    for row in made["rows"]:
        assert 0 < row["step_ms"] <= row["slowest_step_ms"]
        assert row["prefill_s"] > 0
        assert row["peak_growth"] >= 0
    assert [row["cache"] for row in made["side_by_side"]] == caches
    assert any("llama.cpp" in line for line in made["left_out"])
    assert made["environment"]["kernels"]
