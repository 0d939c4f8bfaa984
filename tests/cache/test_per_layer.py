"""Each layer can have its own specification."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cache_models import make, tokens

import tessera
from tessera.cache import PerLayer, parse
from tessera.evaluation.methods import method, short
from tessera.evaluation.protocols import filler, paper_spec
from tessera.tiers.per_layer import parse as parse_any

TEXT = "{0-1,-1: sink:4 + hqmq:5 + recent:16; *: sink:4 + hqmq:3@128 + recent:16}"


def test_the_first_choice_that_names_a_layer_is_its_own() -> None:
    spec = parse_any(" {0-1, -1 : recent:16 + sink:4+hqmq:5;*:sink:4 + hqmq:3@128 + recent:16 } ")
    assert isinstance(spec, PerLayer)
    assert str(spec) == TEXT
    assert parse_any(TEXT) == spec
    assert parse_any(spec) is spec
    first, other = (parse(words) for words in ("sink:4 + hqmq:5 + recent:16", "sink:4 + hqmq:3@128 + recent:16"))
    assert spec.of(5) == [first, first, other, other, first]
    assert parse_any("{-2--1: dense; *: q4_0}").of(4) == [parse("q4_0")] * 2 + [parse("dense")] * 2
    assert (spec.bounded, spec.dense, spec.sink, spec.tensor_cache) == (True, False, 4, False)
    assert parse_any("dense") == parse("dense")
    assert (method(TEXT), short(TEXT)) == ("differs by layer", "hqmq:5 hqmq:3")
    assert paper_spec(TEXT) == "{0-1,-1: sink:4 + hqmq:5; *: sink:4 + hqmq:3}"
    assert paper_spec("{0: sink:4 + hqmq:3; *: sink:2 + hqmq:3}") is None
    assert filler("{0: dense; *: sink:4 + hqmq:3}", 512) == filler("sink:4 + hqmq:3", 512) == 4
    assert str(spec.with_sinks(2)) == TEXT.replace("sink:4", "sink:2")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{0: dense; *: q4_0", "the brace of .* is not closed"),
        ("{dense; *: q4_0}", "'dense' in .* does not begin with layers and a colon"),
        ("{a: dense; *: q4_0}", "'a: dense' in .* does not begin with layers"),
        ("{0: snk:4 + q4_0; *: q4_0}", "unknown tier 'snk'"),
        ("{0: window:24 + tc; *: q4_0}", "in the specs of all layers or of none"),
        ("{7: dense; *: q4_0}", "there is no layer '7': the model has 2"),
        ("{1-0: dense; *: q4_0}", "layers '1-0' are none"),
        ("{*: q4_0; 0: dense}", "'0' in .* comes too late"),
        ("{0: dense}", "names no spec for layers 1 to 1"),
    ],
)
def test_mistakes_are_named(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        tessera.Cache(text, make())
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_each_layer_keeps_what_its_spec_says(tmp_path: Path) -> None:
    model, ids = make(num_hidden_layers=3), tokens(2, 420)
    cache = tessera.Cache("{1: sink:2 + hqmq:3@128 + recent:16; -1: dense; *: sink:4 + hqmq:5 + recent:32}", model)
    model(ids[:, :400], past_key_values=cache)
    first, second, third = (layer.groups[0].chain for layer in cache.layers)
    assert (first.sink.tokens, first.held["quantized"]) == (4, (400 - 4 - 32) // 64 * 64)
    assert (second.sink.tokens, second.held["quantized"]) == (2, 128)
    assert (third.sink.tokens, third.recent.tokens) == (0, 400)
    report = cache.report()
    assert set(report.tiers) == {"sink", "hqmq:5", "hqmq:3", "recent", "dense"}
    assert report.tier_bits["hqmq:5"] > report.tier_bits["hqmq:3"] + 1.5
    cache.save(tmp_path / "c")
    loaded = tessera.Cache.load(tmp_path / "c", model)
    assert loaded.spec == cache.spec
    found, wanted = (model(ids[:, 400:], past_key_values=one).logits for one in (loaded, cache))
    assert torch.equal(found, wanted)


@torch.no_grad()
def test_the_same_in_every_layer_is_the_spec_itself() -> None:
    model, ids = make(), tokens(1, 300)
    one, other = (tessera.Cache(spec, model) for spec in ("sink:4 + hqmq:4 + recent:16", "{*: sink:4 + hqmq:4 + recent:16}"))
    first, second = (model(ids, past_key_values=cache).logits for cache in (one, other))
    assert torch.equal(first, second)
    assert one.report().tiers == other.report().tiers
