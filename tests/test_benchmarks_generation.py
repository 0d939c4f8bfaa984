"""Generation of a pretrained model is measured with every kind of cache."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CACHES = ["DynamicCache", "sink:4 + hqmq:4 + recent:16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import model_generation

    return model_generation


def test_caches_prefill_and_decode_alternately(measuring: Any, folder: str) -> None:
    models = {False: measuring.load(folder, "DynamicCache"), True: measuring.load(folder, "dense")}
    runs = [measuring.Run(cache, 300, 100) for cache in CACHES]
    rows = measuring.times(models, runs, steps=70, repeats=1)
    assert [(row["cache"], row["tokens"], row["chunk"]) for row in rows] == [(cache, 300, 100) for cache in CACHES]
    for row in rows:
        assert 0 < row["step_ms"] <= row["slowest_step_ms"]
        assert 0 < row["step_processor_ms"] <= row["slowest_step_processor_ms"]
        assert row["prefill_s"] > 0


def test_memory_and_time_are_told_through_a_pipe(measuring: Any, folder: str) -> None:
    here, there = multiprocessing.Pipe()
    measuring.memory(folder, measuring.Run(CACHES[1], 300, 300), there)
    assert here.recv() >= 0
    here.send("go")
    measuring.generate(folder, measuring.Run(CACHES[1], 70, 70), 3, 1, there)
    assert here.recv() == "ready"
    assert here.recv() > 0


def test_peers_that_are_not_installed_are_named(measuring: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring.importlib.util, "find_spec", lambda name: None)
    assert measuring.missing("QuantizedCache, hqq") == "hqq"
    assert measuring.missing("DynamicCache") is None
    assert measuring.missing("dense") is None


@pytest.mark.slow
def test_a_small_model_is_measured(tmp_path: Path, folder: str) -> None:
    command = [sys.executable, str(BENCHMARKS / "generation.py"), "--model", folder, "--tokens", "300", "--chunk", "100"]
    command += ["--steps", "70", "--repeats", "1", "--caches", *CACHES, "--json", str(tmp_path / "made.json")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    made = json.loads((tmp_path / "made.json").read_text())
    assert [(row["cache"], row["chunk"]) for row in made["rows"]] == [
        (cache, chunk) for chunk in (300, 100) for cache in CACHES
    ]
    assert all(row["peak_growth"] >= 0 for row in made["rows"])
    assert [row["cache"] for row in made["side_by_side"]] == CACHES
    assert any("llama.cpp" in line for line in made["left_out"])
    assert made["environment"]["kernels"]
