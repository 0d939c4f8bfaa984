"""States of both memories on a cache's layers follow all operations on the cache, Tessera's or transformers'."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_models import logits, make, padding, tokens
from test_attached_memory import SPEC
from test_attached_memory import attached as with_tensor_cache
from test_attached_tensor_memory import attached as with_tensor_memory
from test_report import memory
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

import tessera
from tessera.cache_layers.layer_states import LayerState, state_of, stateful
from tessera.tensor_memory import TensorMemoryConfig

TM = TensorMemoryConfig(channels=4, grid=(3, 3, 3), chunk=3)
MODELS: dict[str, Callable[[], Any]] = {
    "tensor_cache": with_tensor_cache,
    "tensor_memory": lambda: with_tensor_memory(config=TM),
}
OURS = {"tensor_cache": SPEC, "tensor_memory": "sink:2 + window:200"}
#: Left padding, and padding within later calls.
MASK = padding((0, 9, 4), 200)
MASK[1, 50:53] = 0


def cache_of(kind: str, model: Any, memory: str) -> Any:
    if kind == "tessera":
        return tessera.Cache(OURS[memory], model)
    return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=200)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


BOTH = pytest.mark.parametrize("memory", list(MODELS))
KINDS = pytest.mark.parametrize("kind", ["tessera", "dynamic"])


def pickled(cache: Any) -> Any:
    return pickle.loads(pickle.dumps(cache))


@BOTH
@pytest.mark.parametrize("kind", ["tessera", "dynamic", "static"])
@pytest.mark.parametrize("how", [copy.deepcopy, pickled])
def test_a_copy_goes_on_by_itself_as_the_cache_does(how: Callable[[Any], Any], kind: str, memory: str) -> None:
    model, ids = MODELS[memory](), tokens(3, 120)
    cache = cache_of(kind, model, memory)
    logits(model, cache, ids[:, :80], (60, 20), MASK[:, :80])
    twin = how(cache)
    other = tokens(3, 40)
    wanted = logits(model, cache, ids[:, 80:], (30, 10), MASK[:, :120])
    aside = logits(model, twin, other, (40,), MASK[:, :120])
    again = cache_of(kind, model, memory)
    close(aside, logits(model, again, torch.cat((ids[:, :80], other), 1), (60, 20, 40), MASK[:, :120])[:, 80:])
    whole = cache_of(kind, model, memory)
    close(wanted, logits(model, whole, ids, (60, 60), MASK[:, :120])[:, 80:])


@BOTH
@KINDS
def test_rows_go_along_however_they_are_changed(kind: str, memory: str) -> None:
    model, ids = MODELS[memory](), tokens(3, 90)
    cache = cache_of(kind, model, memory)
    logits(model, cache, ids[:, :70], (60, 10), MASK[:, :70])
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_select_indices(torch.tensor([True, False, True]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0, 1]))
    rows = torch.tensor([1, 2, 2])
    found = logits(model, cache, ids[rows, 70:], (1, 19), MASK[rows, :90])
    plain = cache_of(kind, model, memory)
    close(found, logits(model, plain, ids[rows], (60, 30), MASK[rows, :90])[:, 70:])


@BOTH
@KINDS
def test_each_layer_leads_its_own_state_along(kind: str, memory: str) -> None:
    """Code that iterates over `cache.layers` calls layers one by one."""
    model, ids = MODELS[memory](), tokens(3, 60)
    cache = cache_of(kind, model, memory)
    logits(model, cache, ids[:, :20], (20,), MASK[:, :20])
    for layer in cache.layers:
        layer.crop(-3)
        layer.reorder_cache(torch.tensor([1, 2, 0]))
    rows = torch.tensor([1, 2, 0])
    mask = torch.cat((MASK[:, :17], MASK[:, 20:63]), 1)[rows]
    found = logits(model, cache, ids[rows, 17:], (43,), mask)
    real = mask[:, 17:].bool()
    close(found[real], logits(model, cache_of(kind, model, memory), ids[rows], (60,), mask)[:, 17:][real])
    for layer in cache.layers:
        layer.reset()
    close(
        logits(model, cache, ids, (60,), MASK[:, :60]), logits(model, cache_of(kind, model, memory), ids, (60,), MASK[:, :60])
    )


@BOTH
@KINDS
def test_an_offloaded_cache_goes_on(kind: str, memory: str) -> None:
    model, ids = MODELS[memory](), tokens(3, 90)
    cache, moved = cache_of(kind, model, memory), []
    logits(model, cache, ids[:, :70], (70,), MASK[:, :70])
    for layer in cache.layers:
        states = stateful(layer)
        assert (len(list(states)) > 0) == (kind == "dynamic" or memory == "tensor_memory")  # Tessera's tier is not among them
        states.to = lambda device, states=states: moved.append(torch.device(device).type)  # type: ignore[method-assign]
        layer.offload()
    if kind == "dynamic" or memory == "tensor_memory":
        assert set(moved) == {"cpu"}
    before = len(moved)
    found = logits(model, cache, ids[:, 70:], (20,), MASK[:, :90])
    if kind == "dynamic":
        assert len(moved) == before + len(cache.layers)  # moved away again after use
    for layer in cache.layers:
        layer.prefetch()
    close(found, logits(model, cache_of(kind, model, memory), ids, (70, 20), MASK[:, :90])[:, 70:])


@BOTH
def test_a_layer_of_transformers_stays_what_it_was_but_for_its_state(memory: str) -> None:
    model = MODELS[memory]()
    cache = DynamicCache()
    model(tokens(1, 40), past_key_values=cache)
    assert all(isinstance(layer, DynamicLayer) for layer in cache.layers)
    assert all(type(layer).__name__ == "DynamicLayer" for layer in cache.layers)
    assert "DynamicLayer" in repr(cache)
    assert all(isinstance(state_of(layer, memory), LayerState) for layer in cache.layers)
    plain = DynamicCache()
    assert state_of(DynamicLayer(), memory) is None
    logits(make(), plain, tokens(1, 40), (40,))
    assert all(type(layer) is DynamicLayer for layer in plain.layers)


def test_a_crop_that_a_later_layer_would_refuse_is_refused_before_any_layer_is_cropped() -> None:
    model = with_tensor_memory(config=TensorMemoryConfig(channels=4, grid=(3, 3), every=2), num_hidden_layers=4)
    for cache in (DynamicCache(config=model.config), tessera.Cache("dense", model)):
        ids = tokens(1, 300)
        logits(model, cache, ids[:, :290], (289, 1))
        for each in (cache, copy.deepcopy(cache)):
            with pytest.raises(ValueError, match="goes back to"):
                each.crop(-200)
            assert {layer.get_seq_length() for layer in each.layers} == {290}
            close(logits(model, each, ids[:, 290:], (10,)), logits(model, None, ids, (300,))[:, 290:])


# Files and bytes of our own


@pytest.mark.parametrize("remove", [0, 5, 16])
@pytest.mark.parametrize("spec", ["sink:4 + hqmq:4 + recent:64", "dense"])
def test_a_saved_cache_holds_what_a_tensor_memory_has_read(spec: str, remove: int, tmp_path: Path) -> None:
    model, ids = with_tensor_memory(config=TM), tokens(3, 120)
    cache = tessera.Cache(spec, model)
    logits(model, cache, ids[:, :80], (70, 1, 1, 8), MASK[:, :80])
    cache.crop(-remove)
    cache.save(tmp_path / "c")
    loaded = tessera.Cache.load(tmp_path / "c", model)
    assert loaded.report().tiers["tm"] == cache.report().tiers["tm"]
    for each in (cache, loaded):
        each.reorder_cache(torch.tensor([2, 1, 0]))
    mask = torch.cat((MASK[:, : 80 - remove], torch.ones(3, 40, dtype=torch.long)), 1).flip(0)
    found, wanted = (logits(model, each, ids[:, 80:], (1, 29, 10), mask) for each in (loaded, cache))
    assert torch.equal(found, wanted)
    for each in (cache, loaded):
        each.crop(-12)
    found, wanted = (logits(model, each, ids[:, :9], (9,), mask[:, :-3]) for each in (loaded, cache))
    assert torch.equal(found, wanted)


def test_a_cache_that_a_tensor_memory_has_read_along_with_is_loaded_with_the_same_one_only(tmp_path: Path) -> None:
    model, path = with_tensor_memory(config=TM), tmp_path / "c"
    cache = tessera.Cache("dense", model)
    logits(model, cache, tokens(1, 30), (30,))
    cache.save(path)
    other = with_tensor_memory(config=TensorMemoryConfig(channels=4, grid=(3, 3), chunk=3))
    for given in (make(), model.config, other, with_tensor_cache()):
        with pytest.raises(ValueError, match=r"a Tensor Memory .* had read along with this cache, and yours is"):
            tessera.Cache.load(path, given)
    # A cache that was loaded from a file, or copied, is equal.
    tessera.save_memory(model, tmp_path / "m")
    again = tessera.load_memory(make(), tmp_path / "m")
    more = tokens(1, 9)
    assert torch.equal(
        logits(again, tessera.Cache.load(path, again), more, (9,)), logits(model, tessera.Cache.load(path, model), more, (9,))
    )


def test_a_file_without_a_tensor_memory_has_the_number_that_older_versions_read(tmp_path: Path) -> None:
    from safetensors import safe_open

    for model, number in ((make(), 3), (with_tensor_memory(config=TM), 4)):
        cache = tessera.Cache("dense", model)
        logits(model, cache, tokens(1, 9), (9,))
        cache.save(tmp_path / "c")
        with safe_open(tmp_path / "c", "pt") as file:
            assert f'"format": {number},' in file.metadata()["tessera_cache"]


def test_what_was_read_by_a_memory_that_is_gone_is_not_saved(tmp_path: Path) -> None:
    model = with_tensor_memory(config=TM)
    cache = tessera.Cache("dense", model)
    logits(model, cache, tokens(1, 30), (30,))
    tessera.detach(model)
    logits(model, cache, tokens(1, 5), (5,))
    cache.save(tmp_path / "c")
    loaded = tessera.Cache.load(tmp_path / "c", model)
    more = tokens(1, 5)
    assert torch.equal(logits(model, loaded, more, (5,)), logits(model, cache, more, (5,)))


def test_bytes_of_a_report_count_what_a_tensor_memory_keeps() -> None:
    model = with_tensor_memory(config=TM)
    other = make()
    cache, plain = (tessera.Cache("sink:4 + hqmq:4 + recent:64", each) for each in (model, other))
    assert cache.report().tiers.get("tm") is None
    logits(model, cache, tokens(3, 100), (90, 1, 9), MASK[:, :100])
    logits(other, plain, tokens(3, 100), (90, 1, 9), MASK[:, :100])
    for change in (lambda: None, lambda: cache.crop(-3), lambda: cache.batch_select_indices(torch.tensor([2, 0, 0]))):
        change()
        report = cache.report()
        assert report.tiers["tm"] > 0
        assert report.nbytes == sum(report.tiers.values()) == memory(cache)
    cache.reset()
    assert cache.report().nbytes == memory(cache) == 0
    assert plain.report().tiers.get("tm") is None
