"""`tessera.plan` names the right cache, and the reason."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_models import FAMILIES, make, tokens
from transformers import (
    DeepseekV3Config,
    Gemma3nTextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PretrainedConfig,
    T5Config,
)

import tessera
from tessera.planning import PlanRow
from tessera.planning.candidates import forgetting, keeping
from tessera.planning.measured import FILE, frontier, measured

ROOT = Path(__file__).resolve().parent.parent.parent

#: The shape of a Llama of eight billion parameters.
EIGHT = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131_072,
    dtype="bfloat16",
)


def rows(found: Any) -> dict[str, PlanRow]:
    return {row.spec: row for row in found.rows}


def test_the_cache_with_the_smallest_error_that_fits_is_named() -> None:
    for budget, wanted in (
        ("17GiB", "dense"),
        ("6GiB", "sink:4 + hqmq:5 + recent:128"),
        ("5GiB", "sink:4 + hqmq:4 + recent:128"),
    ):
        found = tessera.plan(EIGHT, context="128k", budget=budget)
        assert found.spec == wanted
        fitting = [row for row in found.rows if row.kl is not None and row.fits]
        assert found.spec == min(fitting, key=lambda row: row.kl or 0).spec
    assert (found.context, found.budget, found.batch, found.dtype, found.made_for) == (131072, 5 << 30, 1, "bfloat16", 131072)


def test_what_forgets_ranks_below_what_keeps_all_and_by_how_much_it_keeps() -> None:
    found = tessera.plan(EIGHT, context="128k", budget="4GiB")
    fits = [row for row in found.rows if row.fits]
    assert list(found.rows) == fits + [row for row in found.rows if not row.fits]
    assert [row.kept for row in fits] == sorted((row.kept for row in fits), reverse=True)
    assert fits[0].kept == 131072 > fits[-1].kept
    assert all((row.kl is None) == (row.kept < 131072) for row in found.rows)
    small = tessera.plan(EIGHT, context="1M", budget="1GiB")
    assert small.spec is not None
    assert "@" in small.spec
    best = small.rows[0]
    assert best.reach is None
    assert 4096 < best.kept < 1 << 20


def test_caches_that_forget_are_as_large_as_the_budget_lets_them_be() -> None:
    found = tessera.plan(EIGHT, context="128k", budget="4GiB")
    window = next(row for row in found.rows if "window" in row.spec)
    assert window.fits
    size = int(window.spec.rpartition(":")[2])
    assert not tessera.plan(EIGHT, context="128k", budget="4GiB", specs=[f"sink:4 + window:{2 * size}"]).rows[0].fits


def test_nothing_is_named_where_nothing_fits() -> None:
    found = tessera.plan(EIGHT, context="128k", budget="1MB")
    assert found.spec is None
    assert not any(row.fits for row in found.rows)
    assert {row.reach for row in found.rows} == {0}


def test_the_context_that_is_reached_fits_and_the_next_does_not() -> None:
    specs = [*keeping(), *forgetting(4096)]
    budget = 1 << 30
    for spec, row in rows(tessera.plan(EIGHT, context=1000, budget=budget, specs=specs)).items():
        if row.reach is None:
            assert tessera.plan(EIGHT, context="16M", budget=budget, specs=[spec]).rows[0].fits
            continue
        at = tessera.plan(EIGHT, context=row.reach, budget=budget, specs=[spec]).rows[0]
        behind = tessera.plan(EIGHT, context=row.reach + 1024, budget=budget, specs=[spec]).rows[0]
        assert at.fits
        assert not behind.fits


def test_rows_and_dtype_and_bandwidth_count() -> None:
    one = tessera.plan(EIGHT, context="8k", budget="8GiB", specs=["dense"], bandwidth="50GB/s").rows[0]
    four = tessera.plan(EIGHT, context="8k", budget="8GiB", specs=["dense"], batch=4).rows[0]
    wide = tessera.plan(EIGHT, context="8k", budget="8GiB", specs=["dense"], dtype=torch.float32).rows[0]
    assert one.nbytes == one.read == 8192 * 2 * 32 * 8 * 128 * 2
    assert four.nbytes == 4 * one.nbytes
    assert wide.nbytes == 2 * one.nbytes
    assert one.seconds == one.read / 50e9
    assert four.seconds is None


def test_bytes_are_those_of_a_real_cache_of_the_named_spec() -> None:
    model = make("gemma3", torch.bfloat16)
    found = tessera.plan(model, context=600, budget="200KB", batch=2)
    assert found.dtype == "bfloat16"
    assert found.spec is not None
    for row in found.rows:
        cache = tessera.Cache(row.spec, model)
        with torch.inference_mode():
            model(tokens(2, 600), past_key_values=cache)
        assert cache.report().nbytes == row.nbytes


def test_layers_that_slide_forget_what_the_model_does_not_look_at() -> None:
    config = MistralConfig(
        hidden_size=256, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, sliding_window=1024
    )
    found = rows(tessera.plan(config, context="32k", budget="1GiB", specs=["dense", "window:2048", "window:512", "hqmq:4"]))
    assert found["dense"].nbytes == found["window:2048"].nbytes
    assert found["dense"].kept == found["window:2048"].kept == 32768
    assert (found["window:2048"].kl, found["window:512"].kl) == (0.0, None)
    assert found["window:512"].kept == 512
    assert found["hqmq:4"].reach is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DeepseekV3Config(), "multi-head latent attention"),
        (Gemma3nTextConfig(), "read the keys and values of other layers"),
        (T5Config(), "encoder-decoder"),
    ],
)
def test_models_that_a_cache_cannot_serve_are_refused_by_cause(config: PretrainedConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tessera.plan(config, context="8k", budget="1GiB")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": "8q"}, "8q"),
        ({"budget": "much"}, "much"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"dtype": "int8"}, "no dtype 'int8'"),
        ({"specs": ["hqmk:4"]}, "did you mean 'hqmq'"),
        ({"specs": ["sink:4 + window:64 + tc"]}, "a plan counts caches without"),
        ({"specs": ["hqmq:s96_r4_med3"]}, "depend on the numbers"),
        ({"specs": []}, "at least one"),
        ({"bandwidth": "50GB"}, "50GB/s"),
    ],
)
def test_wrong_words_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tessera.plan(EIGHT, **{"context": "8k", "budget": "1GiB", **options})
    with pytest.raises(TypeError, match="expected a transformers model or its config"):
        tessera.plan(3, context="8k", budget="1GiB")


def test_what_is_found_cannot_be_changed() -> None:
    found = tessera.plan(EIGHT, context="8k", budget="1GiB", specs=["dense"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.spec = "q4_0"  # type: ignore[misc]


def test_a_folder_a_config_and_a_model_are_planned_alike(tmp_path: Path) -> None:
    kind, model_class, arguments = FAMILIES["llama"]
    config = kind(**arguments)
    config.save_pretrained(tmp_path)
    options: dict[str, Any] = {"context": 300, "budget": "1MB", "dtype": "float32"}
    wanted = tessera.plan(config, **options)
    assert tessera.plan(str(tmp_path), **options) == wanted
    assert tessera.plan(str(tmp_path / "config.json"), **options) == wanted
    assert tessera.plan(model_class(config), **options) == wanted


def test_a_gguf_file_is_planned_by_its_header(small_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from gguf_files import write

    model = LlamaForCausalLM.from_pretrained(small_model)
    write(model, AutoTokenizer.from_pretrained(small_model), tmp_path / "small.gguf")
    found = tessera.plan(str(tmp_path / "small.gguf"), context=300, budget="1MB", dtype="float32")
    assert found == tessera.plan(model, context=300, budget="1MB")


def test_a_long_context_takes_no_memory_and_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are made only on the device "meta", and their number does not grow with the context."""
    made = []
    empty = torch.empty

    def counted(*shape: Any, **options: Any) -> Any:
        tensor = empty(*shape, **options)
        made.append(tensor.device.type)
        return tensor

    monkeypatch.setattr(torch, "empty", counted)
    tessera.plan(EIGHT, context="128k", budget="5GiB", specs=["sink:4 + hqmq:4 + recent:128"])
    steps = len(made)
    tessera.plan(EIGHT, context="128M", budget="5GiB", specs=["sink:4 + hqmq:4 + recent:128"])
    assert len(made) == 2 * steps
    assert set(made) == {"meta"}


def test_the_table_of_errors_is_what_was_measured() -> None:
    spec = importlib.util.spec_from_file_location("plan_errors", ROOT / "benchmarks" / "plan_errors.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert json.loads(FILE.read_text(encoding="utf-8")) == module.table(), "run python benchmarks/plan_errors.py"
    assert len(measured()) > 10
    errors = [measured()[codec] for codec in frontier()]
    assert [row.kl for row in errors] == sorted(row.kl for row in errors)
    assert [row.bits for row in errors] == sorted((row.bits for row in errors), reverse=True)
    assert all(math.isfinite(row.kl) and row.kl > 0 for row in measured().values())
