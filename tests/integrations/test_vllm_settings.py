"""The settings and refusals of an engine, tested without vLLM."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tessera.codecs.channel_stats import KeyStats, save_stats
from tessera.integrations.vllm import statistics
from tessera.integrations.vllm.plugin import version_refusal
from tessera.integrations.vllm.refusals import engine_refusal, layer_refusal, spec_refusal
from tessera.integrations.vllm.settings import configured, read


@pytest.mark.parametrize("text", ["hqmq:4", "sink:4 + hqmq:3", "sink:4 + hqmq:4 + recent:64"])
def test_specifications_that_an_engine_follows(text: str) -> None:
    settings = read(text)
    assert settings.codec.spec in text
    assert settings.sink == (4 if "sink" in text else 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dense", "needs a codec"),
        ("sink:4 + window:512", "needs a codec"),
        ("hqmq:4@32768", "nothing is dropped"),
        ("hqmq:4 + recent:128", "at most 'recent:64'"),
        ("hqmq:4@32768 + hqmq:3", "nothing is dropped"),
        ("{0: hqmq:5; *: hqmq:3}", "one specification"),
        ("hqmq:4@32768 + tc", "nothing is dropped"),
        ("sink:64 + hqmq:4", "'sink:63' is the most"),
        ("hqmk:4", "did you mean 'hqmq'"),
    ],
)
def test_specifications_that_an_engine_cannot_follow(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(text)


def test_the_engine_s_own_setting_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_SPEC", "hqmq:3")
    given = configured(SimpleNamespace(additional_config={"tessera": "hqmq:4"}))
    usual = configured(SimpleNamespace(additional_config={}))
    assert given is not None
    assert given.codec.spec == "hqmq:4"
    assert usual is not None
    assert usual.codec.spec == "hqmq:3"
    monkeypatch.delenv("TESSERA_SPEC")
    assert configured(SimpleNamespace(additional_config={})) is None


@pytest.mark.parametrize("version", ["0.31.0", "0.32.1rc1", "0.33.0+cpu"])
def test_versions_that_are_supported(version: str) -> None:
    assert version_refusal(version) is None


@pytest.mark.parametrize("version", ["0.30.2", "0.34.0", "1.0.0"])
def test_versions_that_are_not(version: str) -> None:
    assert str(version_refusal(version)) == f"Tessera serves in vLLM 0.31 to 0.33; this is {version}"


def config(**changes: Any) -> SimpleNamespace:
    """Make a supported engine config with changes, as `part__name=value`."""
    made = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=128, prefix_match_unit=None, cache_dtype="auto"),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1, decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
        kv_transfer_config=None,
        model_config=SimpleNamespace(is_hybrid=False),
        speculative_config=None,
    )
    for path, value in changes.items():
        *parts, name = path.split("__")
        target = made
        for part in parts:
            target = getattr(target, part)
        setattr(target, name, value)
    return made


def drafting(method: str, count: int) -> SimpleNamespace:
    return SimpleNamespace(method=method, num_speculative_tokens=count)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"speculative_config": drafting("ngram", 5)}, None),
        ({"cache_config__prefix_match_unit": 64}, None),
        ({"cache_config__block_size": 16}, "no multiple of a page's 64"),
        ({"cache_config__prefix_match_unit": 32}, "multiples of 64 tokens, not of 32"),
        ({"cache_config__cache_dtype": "fp8"}, "leave it out"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline parallel"),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallel"),
        ({"kv_transfer_config": "a connector"}, "--kv-transfer-config"),
        ({"model_config__is_hybrid": True}, "Mamba"),
        ({"speculative_config": drafting("eagle", 5)}, "eagle"),
        ({"speculative_config": drafting("ngram", 65)}, "at most 64"),
    ],
    ids=str,
)
def test_engines(changes: dict[str, Any], message: str | None) -> None:
    why = engine_refusal(config(**changes))
    assert why is None if message is None else message in str(why)
    if why is not None:
        assert "\n" not in why


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"extra": {"sinks": torch.zeros(8)}}, None),
        ({"attn_type": "encoder_only"}, "encoder only"),
        ({"alibi": [0.5] * 8}, "ALiBi"),
        ({"shared_with": "model.layers.3.self_attn.attn"}, "another's keys and values"),
        ({"kv_heads": 3}, "evenly"),
        ({"dtype": torch.float64}, "float64"),
        ({"extra": {"chunk_lookback": 4}}, "chunk_lookback"),
    ],
    ids=str,
)
def test_layers(changes: dict[str, Any], message: str | None) -> None:
    usual: dict[str, Any] = {"heads": 8, "kv_heads": 2, "attn_type": "decoder", "alibi": None, "shared_with": None}
    why = layer_refusal(**{**usual, "dtype": torch.bfloat16, "extra": {}, **changes})
    assert why is None if message is None else message in str(why)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("FullAttentionSpec", None),
        ("SlidingWindowSpec", None),
        ("ChunkedLocalAttentionSpec", "chunked local attention"),
        ("CrossAttentionSpec", "another kind (CrossAttentionSpec)"),
    ],
)
def test_memory_that_layers_want(kind: str, message: str | None) -> None:
    why = spec_refusal(kind)
    assert why is None if message is None else message in str(why)


@pytest.fixture
def saved(tmp_path: Path) -> str:
    path = tmp_path / "stats.safetensors"
    save_stats([KeyStats(torch.randint(0, 256, (1, 4, 32), dtype=torch.uint8)) for _ in range(3)], path)
    return str(path)


def test_each_rank_has_the_statistics_of_its_heads(saved: str) -> None:
    whole = statistics.load(saved)[1]
    assert whole is not None
    halves = [statistics.of_layer(saved, 1, 3, 2, 32, rank, 2).sizes for rank in range(2)]
    assert torch.equal(torch.cat(halves, 1), whole.sizes)
    eighths = [statistics.of_layer(saved, 1, 3, 1, 32, rank, 8).sizes for rank in range(8)]
    assert torch.equal(torch.cat(eighths, 1), whole.sizes.repeat_interleave(2, 1))


@pytest.mark.parametrize(
    ("layers", "heads", "dim", "message"), [(4, 4, 32, "3 layers; yours has 4"), (3, 2, 32, "2 of 32"), (3, 4, 64, "4 of 64")]
)
def test_statistics_of_another_model_are_refused(saved: str, layers: int, heads: int, dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        statistics.of_layer(saved, 0, layers, heads, dim)
    assert "\n" not in str(raised.value)


def test_codecs_without_a_use_for_statistics_refuse_them() -> None:
    assert read("hqmq:4", "stats.safetensors").stats == "stats.safetensors"
    with pytest.raises(ValueError, match="TESSERA_STATS"):
        read("hqmq:4_nostats", "stats.safetensors")
