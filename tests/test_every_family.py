"""Every family of transformers is served correctly or refused with the reason."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, DynamicCache

import tessera
from tessera.attention import over_tiers, switch
from tessera.attention.module_code import touches, windowed
from tessera.tensor_cache import TensorCacheConfig
from tessera.tensor_memory import TensorMemoryConfig
from versions import SECTIONS_OF_ROTARY

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import families  # noqa: E402

#: Families that always run; all others together take minutes.
NAMED = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "gpt_oss", "gpt_neox"]
PARTS = ("cache", "tensor_cache", "tensor_memory")


def built(kind: str, **changes: Any) -> Any:
    config = families.small_config(kind)
    for name, value in changes.items():
        setattr(config, name, value)
    return families.small_model(kind, config)


@pytest.mark.parametrize(
    "kind", [kind if kind in NAMED else pytest.param(kind, marks=pytest.mark.slow) for kind in families.families()]
)
def test_a_family_is_served_or_refused_with_its_cause(kind: str) -> None:
    row = families.walk(kind)
    for part in PARTS:
        found = row.get(part, {"outcome": "not tried", "reason": ""})
        assert found["outcome"] != "fault", f"{part}: {found['reason']}"
    if kind in NAMED:
        assert row["cache"]["outcome"] == "served"
    if kind in ("llama", "qwen3"):
        assert {row[part]["outcome"] for part in PARTS} == {"served"}


def test_every_family_that_transformers_registers_is_recorded() -> None:
    rows = json.loads(families.OUT.read_text(encoding="utf-8"))["rows"]
    faults = [row["family"] for row in rows if any(row.get(part, {}).get("outcome") == "fault" for part in PARTS)]
    assert faults == []
    assert {row["family"] for row in rows} >= set(NAMED)
    assert sum(row["cache"]["outcome"] in ("served", "decoded") for row in rows) >= 100


def test_the_walk_notices_a_family_that_is_neither_served_nor_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switch, "touches", lambda module: None)
    row = families.walk("jetmoe")
    assert row["cache"]["outcome"] == "fault"
    assert "DeferredKVError" in row["cache"]["reason"]


def test_the_walk_notices_a_wrong_number(monkeypatch: pytest.MonkeyPatch) -> None:
    right = over_tiers._attend
    monkeypatch.setattr(over_tiers, "_attend", lambda *args: right(*args) * 1.01)
    row = families.walk("llama")
    assert row["cache"]["outcome"] == "fault"
    assert "wrong numbers" in row["cache"]["reason"]


# Refusals by cause


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("mllama_text_model", {}, r"cross_attention_layers.*keys and values of a picture"),
        ("mimo_v2_flash", {}, r"its values have another width \(v_head_dim 128\) than its keys \(192\)"),
    ],
)
def test_a_config_whose_layers_keep_something_else_is_refused(kind: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"does not support {kind}.*{words}"):
        tessera.Cache("dense", AutoConfig.for_model(kind, **changes))


def test_code_that_deviates_from_its_config_is_refused_before_anything_is_switched() -> None:
    model = built("mimo_v2_flash")
    for do in (lambda: tessera.Cache("dense", model), lambda: tessera.attach(model, TensorCacheConfig(window=32))):
        with pytest.raises(ValueError, match=r"layer 1 makes keys of 64 and values of 64 .* its config says 2 heads of 16"):
            do()
    assert model.config._attn_implementation != "tessera"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("diffllama", r"DiffLlamaAttention computes with the cached keys or values itself \(torch.chunk\(value_states"),
        ("doge", r"DogeAttention computes with the cached keys or values itself \(value_states.transpose\)"),
        ("jetmoe", r"JetMoeAttention computes with the cached keys or values itself \(key_states.repeat\)"),
        ("moshi", r"sliding window \(24\), which MoshiAttention does not apply"),
    ],
)
def test_attention_that_cannot_be_given_tiers_is_refused_and_served_from_its_config(kind: str, words: str) -> None:
    model = built(kind)
    for do in (
        lambda: tessera.Cache("dense", model),
        lambda: tessera.enable(model),
        lambda: tessera.attach(model, TensorCacheConfig(window=32)),
    ):
        with pytest.raises(ValueError, match=words):
            do()
    assert model.config._attn_implementation != "tessera"
    wanted = families.logits(model, DynamicCache(config=model.config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(families.logits(model, tessera.Cache("dense", model.config)), wanted)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("opt", r"OPTDecoderLayer gives its norm \(6, 64\) for 2 rows of 3 tokens"),
        ("paligemma", "tokens see later ones"),
    ],
)
def test_a_tensor_memory_that_could_not_tell_rows_or_later_tokens_is_refused(kind: str, words: str) -> None:
    model = built(kind)
    before = families.logits(model, None, (families.TOKENS,))
    with pytest.raises(ValueError, match=words):
        tessera.attach(model, TensorMemoryConfig(channels=4, grid=(3, 3)))
    assert torch.equal(families.logits(model, None, (families.TOKENS,)), before)


def test_a_model_that_is_no_decoder_is_given_no_tensor_cache() -> None:
    config = families.small_config("bert")
    config.is_decoder = False
    with pytest.raises(ValueError, match="is_decoder is False in its config, so its attention sees later tokens"):
        tessera.attach(families.small_model("bert", config), TensorCacheConfig(window=32, rotary=True))


@SECTIONS_OF_ROTARY
def test_a_rotary_phase_of_several_positions_a_token_is_left_on_or_refused() -> None:
    model = built("qwen2_vl")
    with pytest.raises(ValueError, match=r"several positions each, of time, height and width.*rotary=True"):
        tessera.attach(model, TensorCacheConfig(window=32))
    tessera.attach(model, TensorCacheConfig(window=32, sink=4, rotary=True))
    found = families.logits(model, tessera.Cache("sink:4 + window:32 + tc", model))
    torch.testing.assert_close(found, families.logits(model, None, (families.TOKENS,)), atol=1e-4, rtol=1e-4)


# Reading code


class _Attention(torch.nn.Module):
    def __init__(self, option: bool, indexer: Any = None) -> None:
        super().__init__()
        self.option, self.indexer = option, indexer


class WithOption(_Attention):
    def forward(self, q: Any, k: Any, v: Any, cache: Any) -> Any:
        k, v = cache.update(k, v, 0)
        attend = ALL_ATTENTION_FUNCTIONS["eager"]  # type: ignore[name-defined]  # noqa: F821
        if self.option:
            k = k * 2
        if self.indexer is not None:
            v = self.indexer(v)
        return attend(self, q, k, value=v)


class WithOtherAttention(_Attention):
    def forward(self, q: Any, k: Any, v: Any, cache: Any) -> Any:
        k = k * 2
        k, v = cache.update(k, v, 0)
        eager = self.config._attn_implementation == "eager"
        self.kept[0] = k, v  # type: ignore[index]
        attend = ALL_ATTENTION_FUNCTIONS["eager"]  # type: ignore[name-defined]  # noqa: F821
        if eager and self.option:
            return k @ v
        return attend(self, q, k, v)


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        (WithOption(False), None),
        (WithOption(True), "k * 2"),
        (WithOption(False, torch.nn.Identity()), "self.indexer(v)"),
        (WithOtherAttention(True), None),
        (torch.nn.Linear(1, 1), None),
    ],
)
def test_code_is_read_for_what_it_does_to_cached_keys(module: torch.nn.Module, wanted: str | None) -> None:
    assert touches(module) == wanted


def test_code_that_knows_no_window_is_told_from_code_that_does() -> None:
    def attentions(kind: str) -> Iterator[torch.nn.Module]:
        return (m for m in built(kind).modules() if re.fullmatch(r"M\w+Attention", type(m).__name__))

    assert all(windowed(module) for module in attentions("mistral"))
    assert not any(windowed(module) for module in attentions("moshi"))
