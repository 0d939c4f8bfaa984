"""A cache without sinks warns once, on a model whose first token is an attention sink."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any
from unittest.mock import patch

import cache_models
import pytest
import torch

import sink_models
import tessera
from tessera.attention import missing_sinks, over_tiers
from tessera.models import heldout_text, load_demo


def said(model: Any, cache: Any, *calls: torch.Tensor, **options: Any) -> list[str]:
    """Return the warnings about sinks while tokens are read."""
    with warnings.catch_warnings(record=True) as caught, torch.inference_mode():
        warnings.simplefilter("always")
        for ids in calls:
            model(ids, past_key_values=cache, use_cache=True, **options)
    return [str(w.message) for w in caught if "sink" in str(w.message)]


def text(tokens: int, rows: int = 1) -> torch.Tensor:
    """Return (rows, tokens) that begin with the sink token of `sink_models`."""
    ids = torch.randint(1, 257, (rows, tokens))
    ids[:, 0] = 0
    return ids


@pytest.mark.parametrize("spec", ["q4_0", "hqmq:4 + recent:64", "int:4@128"])
def test_a_missing_sink_is_said_once_with_its_remedy(spec: str) -> None:
    model = sink_models.make(sink=True)
    cache = tessera.Cache(spec, model)
    (message,) = said(model, cache, text(100, 2), text(1, 2), text(100, 2))
    assert "Add 'sink:4' to the spec" in message
    assert "of the attention of layer" in message
    cache.reset()
    assert said(model, cache, text(100, 2)) == []


@pytest.mark.parametrize("spec", ["dense", "window:64", "sink:4 + q4_0", "sink:1 + hqmq:4 + recent:64"])
def test_nothing_is_said_where_the_first_token_is_exact(spec: str) -> None:
    model = sink_models.make(sink=True)
    assert said(model, tessera.Cache(spec, model), text(100)) == []


def test_nothing_is_said_of_models_without_a_sink() -> None:
    model = sink_models.make(sink=False)
    assert said(model, tessera.Cache("q4_0", model), text(100), text(100)) == []
    model, tokenizer = load_demo()
    ids = tokenizer(heldout_text(4_000), return_tensors="pt")["input_ids"]
    assert said(model, tessera.Cache("q4_0", model), ids[:, :100], ids[:, 100:300]) == []


def test_nothing_is_said_where_it_cannot_be_known() -> None:
    model = sink_models.make(sink=True)
    assert said(model, tessera.Cache("q4_0", model), text(64), text(100)) == []  # a short first call, then later tokens
    assert said(model, tessera.Cache("q4_0", model, prefill="packed"), text(100)) == []


def test_padding_is_not_taken_for_the_first_token() -> None:
    model = sink_models.make(sink=True)
    ids = torch.cat((torch.full((2, 30), 5), text(100, 2)), dim=1)
    mask = torch.ones_like(ids)
    mask[:, :30] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    options = {"attention_mask": mask, "position_ids": positions}
    assert len(said(model, tessera.Cache("q4_0", model), ids, **options)) == 1
    other = ids.clone()
    other[:, 30] = 7  # no row begins with the sink; padding would, if it were counted
    other[:, :30] = 0
    assert said(model, tessera.Cache("q4_0", model), other, **options) == []


@pytest.mark.parametrize("family", sorted(cache_models.FAMILIES))
def test_families_are_looked_at_without_harm(family: str) -> None:
    model = cache_models.make(family)
    ids = cache_models.tokens(2, 150)
    assert said(model, tessera.Cache("q4_0", model), ids) == []


def test_nothing_is_looked_at_after_the_first_call() -> None:
    for sink, tokens in ((True, 100), (False, 100), (True, 10)):
        model = sink_models.make(sink=sink)
        cache = tessera.Cache("q4_0", model)
        said(model, cache, text(tokens))
        for other in (cache, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            with patch.object(over_tiers, "warn_if_sinks_are_missing", side_effect=AssertionError):
                said(model, other, text(1), text(100))


def test_every_layer_of_the_second_half_is_looked_at_until_one_has_a_sink() -> None:
    model = sink_models.make(sink=False)
    with patch.object(missing_sinks, "first_key_weight", side_effect=[0.1, 0.2]) as weight:
        assert said(model, tessera.Cache("q4_0", model), text(100)) == []
    assert weight.call_count == 2  # of two layers, the first is the middle one
    with patch.object(missing_sinks, "first_key_weight", return_value=0.9) as weight:
        (message,) = said(model, tessera.Cache("q4_0", model), text(100))
    assert weight.call_count == 1
    assert "draws 90% of the attention of layer 0" in message
