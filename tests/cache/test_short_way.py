"""A step of one token in every row goes the short way, with the results and the contents of the long one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_models import make, padding, relative, tokens
from torch import Tensor

import tessera
from tessera.cache_layers.cache_layer import TesseraLayer

SPECS = [
    "dense",
    "sink:4 + hqmq:4 + recent:16",
    "hqmq:k5v3 + recent:3",
    "sink:2 + q4_0 + recent:40",
    "sink:4 + hqmq:4/top:64 + recent:16",
    "sink:70 + scalar:4 + recent:5",
]
#: Nothing is short where each step may drop, pass on or write something.
LONG = ["sink:2 + window:20", "sink:4 + hqmq:4@64 + recent:16", "sink:4 + hqmq:4@64 + hqmq:3 + recent:16"]


def short_steps(monkeypatch: pytest.MonkeyPatch, allowed: bool = True) -> list[bool]:
    """Record for each call of a layer whether it goes the short way; if not allowed, none does."""
    taken: list[bool] = []
    real = TesseraLayer.take_token

    def watch(self: TesseraLayer, queries: Tensor) -> Any:
        found = real(self, queries) if allowed else None
        taken.append(found is not None)
        return found

    monkeypatch.setattr(TesseraLayer, "take_token", watch)
    return taken


@torch.no_grad()
def stream(model: Any, cache: tessera.Cache, ids: Tensor, cuts: tuple[int, ...], mask: Tensor | None = None) -> Tensor:
    """Logits of a text in calls of these lengths; the calls have no mask where there is none."""
    found, at = [], 0
    for n in cuts:
        given = None if mask is None else mask[:, : at + n]
        found.append(model(ids[:, at : at + n], attention_mask=given, past_key_values=cache).logits)
        at += n
    return torch.cat(found, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prompt", [1, 90, 150])
@pytest.mark.parametrize("spec", SPECS)
def test_the_short_way_is_the_long_way(spec: str, prompt: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, cuts = make().to(dtype), tokens(3, prompt + 140), (prompt, *[1] * 140)
    taken = short_steps(monkeypatch)
    cache = tessera.Cache(spec, model)
    found = stream(model, cache, ids, cuts)
    layers = model.config.num_hidden_layers
    # Not where a buffer grows, sinks are filled, or a block is quantised.
    assert 0.4 * 140 * layers < sum(taken) < 0.97 * 140 * layers
    monkeypatch.undo()
    short_steps(monkeypatch, allowed=False)
    other = tessera.Cache(spec, model)
    assert relative(found, stream(model, other, ids, cuts)) < 1e-5
    for layer, same in zip(cache.layers, other.layers, strict=True):
        assert layer.held() == same.held()
        for name, tensors in layer.buffers().items():
            assert all(torch.equal(a, b) for a, b in zip(tensors, same.buffers()[name], strict=True)) or name == "recent"
        for group, alike in zip(layer.groups, same.groups, strict=True):
            assert (group.slots, group.length, group.rows) == (alike.slots, alike.length, alike.rows)
            assert torch.equal(group.chain.recent.keys, alike.chain.recent.keys)
            assert torch.equal(group.chain.recent.values, alike.chain.recent.values)


@pytest.mark.parametrize("spec", LONG)
def test_steps_that_may_pass_tokens_on_go_the_long_way(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, taken = make(), short_steps(monkeypatch)
    stream(model, tessera.Cache(spec, model), tokens(2, 60), (40, *[1] * 20))
    assert taken
    assert not any(taken)


def test_padding_cropping_and_recording_go_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make(), tokens(2, 60)
    taken = short_steps(monkeypatch)
    stream(model, tessera.Cache(SPECS[1], model), ids, (40, *[1] * 20), padding((0, 7), 60))
    assert not any(taken)
    cache = tessera.Cache(SPECS[1], model)
    stream(model, cache, ids, (40,))
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids[:, :1], past_key_values=cache)
    assert not any(taken)
    cache.crop(-1)
    with torch.no_grad():
        for _ in range(3):
            model(ids[:, :1], past_key_values=cache)
    layers = model.config.num_hidden_layers
    assert not any(taken[-3 * layers : -2 * layers])  # of the call after a crop, some tokens may be cropped too
    assert all(taken[-2 * layers :])


def test_a_cache_filled_in_inference_mode_goes_on_outside_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make(), tokens(1, 80)
    wanted = stream(model, tessera.Cache(SPECS[1], model), ids, (40, *[1] * 40))
    cache, taken = tessera.Cache(SPECS[1], model), short_steps(monkeypatch)
    with torch.inference_mode():
        first = stream(model, cache, ids, (40, *[1] * 20))
    rest = stream(model, cache, ids[:, 60:], (1,) * 20)
    assert relative(torch.cat((first, rest), 1), wanted) < 1e-5
    layers = model.config.num_hidden_layers
    assert not any(taken[21 * layers : 22 * layers])  # the buffers are made anew
    assert sum(taken[22 * layers :]) > 15 * layers


@torch.no_grad()
@pytest.mark.parametrize("prompt", [61, 511])
def test_keys_and_values_whose_buffers_were_made_at_different_times_go_on(prompt: int) -> None:
    """Under autocast keys are wider than values; a later step widens only the values, and their buffer is made anew."""
    model, ids = make(), tokens(1, prompt + 6)
    cache = tessera.Cache("dense", model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stream(model, cache, ids, (prompt,))
    with torch.inference_mode():
        stream(model, cache, ids[:, prompt:], (1, 1))
    found = stream(model, cache, ids[:, prompt + 2 :], (1,) * 4)
    assert found.isfinite().all()
    assert {layer.seen for layer in cache.layers} == {prompt + 6}
