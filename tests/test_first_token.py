"""Caches that compress the first token warn on models in which it is an attention sink."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sink_models import make
from tessera.attention.first_token_weight import QUERIES, first_key_weight
from tessera.evaluation import Source, compare, load, read_text
from tessera.evaluation.comparison import TRIED_WITH_SINKS
from tessera.evaluation.first_token import SINK, first_token_weight, lacks_sinks, with_sinks
from tessera.evaluation.table import without_sinks


@pytest.fixture(scope="module")
def tokenizer(small_model: Path) -> Any:
    return load(str(small_model)).tokenizer


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_the_weight_is_that_of_the_first_value(tokens: int) -> None:
    q, k = torch.randn(2, 6, tokens, 8), torch.randn(2, 3, 40, 8)
    v = torch.zeros(2, 3, 40, 1)
    v[:, :, 0] = 1
    seen = torch.ones(tokens, 40, dtype=torch.bool).tril(40 - tokens)
    wanted = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.7, enable_gqa=True)[:, :, -QUERIES:]
    assert float(first_key_weight(q, k, 0.7)) == pytest.approx(float(wanted.mean()), abs=1e-6)


def test_logits_that_take_part_and_caps_count() -> None:
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 5, 8)
    scores = torch.tanh((q @ k.transpose(-1, -2)) / 2) * 2
    logits = torch.cat((scores, torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)), dim=-1)
    wanted = float(logits.softmax(-1)[..., 0].mean())
    assert float(first_key_weight(q, k, 1.0, softcap=2.0, s_aux=torch.tensor([1.0, 2.0]))) == pytest.approx(wanted, abs=1e-6)


def test_a_sink_is_told_from_a_first_token_like_others() -> None:
    ids = torch.cat((torch.zeros(1, 1, dtype=torch.long), torch.randint(1, 257, (1, 299))), dim=1)
    assert first_token_weight(make(sink=True), ids) > 0.6
    assert first_token_weight(make(sink=False), ids) < 0.1


@pytest.mark.parametrize("sink", [True, False])
def test_specs_without_sinks_are_measured_with_them_where_there_is_one(sink: bool, tokenizer: Any, small_text: Path) -> None:
    source = Source("small", make(sink=sink), tokenizer)
    specs = ("q4_0", "hqmq:4 + recent:64", "sink:8 + int:4")
    result = compare(source, read_text([small_text])[0], specs, context=256, count=1)
    found = {name: [r.spec for r in result.rows if r.protocol == name] for name in ("streaming", "paper")}
    assert result.first_token is not None
    assert (result.first_token > SINK) == sink
    lines = without_sinks(result)
    if not sink:
        assert found["streaming"] == ["dense", *specs]
        assert lines == []
        return
    assert found == {
        "streaming": ["dense", "q4_0", "sink:4 + q4_0", "hqmq:4 + recent:64", "sink:4 + hqmq:4 + recent:64", "sink:8 + int:4"],
        "paper": ["dense", "q4_0", "sink:4 + q4_0", "hqmq:4", "sink:4 + hqmq:4", "sink:8 + int:4"],
    }
    assert [line.partition(":")[0] for line in lines] == ["streaming, q4_0", "streaming, hqmq", "paper, q4_0", "paper, hqmq"]
    with_, without = (
        next(r for r in result.rows if r.spec == spec and r.protocol == "paper") for spec in found["paper"][2:0:-1]
    )
    assert f"q4_0: without sinks KL {without.kl:.5f}, with sink:4 {with_.kl:.5f}" in lines[2]
    assert without_sinks(replace(result, first_token=None)) == []


def test_of_what_is_compared_by_default_one_is_tried_with_sinks(tokenizer: Any, small_text: Path) -> None:
    source = Source("small", make(sink=True), tokenizer)
    result = compare(source, read_text([small_text])[0], protocols=("paper",), context=128, count=1)
    assert [r.spec for r in result.rows if "sink" in r.spec] == [with_sinks(TRIED_WITH_SINKS)]


def test_which_specs_lack_sinks() -> None:
    assert [s for s in ("dense", "window:8", "q4_0", "sink:1 + q4_0", "q4_0 + recent:8") if lacks_sinks(s)] == [
        "q4_0",
        "q4_0 + recent:8",
    ]
    assert with_sinks("q4_0@64 + recent:8") == "sink:4 + q4_0@64 + recent:8"
    assert with_sinks("q4_0", ["q4_0 + sink:4"]) == "q4_0 + sink:4"
