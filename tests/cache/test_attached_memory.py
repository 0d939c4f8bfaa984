"""A Tensor Cache attached to models of transformers: what it changes, what it leaves, how it streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cache_models import FAMILIES, logits, make, padding, tokens

import tessera
from tessera.associative import TensorCacheConfig
from tessera.attachment import attachment, memory_parameters, reading

CONFIG = TensorCacheConfig(window=24, sink=3, chunk=16, decay=(10, 1000))
SPEC = "sink:3 + window:24 + tc"
#: mistral and phi3-sliding have windows of their own everywhere.
NAMES = [name for name in FAMILIES if name not in ("mistral", "phi3-sliding")]


def attached(family: str = "llama", config: TensorCacheConfig = CONFIG, trained: bool = True, **changes: Any) -> Any:
    """A model with a memory whose output projection is no longer zero."""
    model = tessera.attach(make(family, **changes), config)
    if trained:
        torch.manual_seed(7)
        with torch.no_grad():
            for layer in attachment(model).layers.values():
                layer.out.weight.normal_(0, 0.2)
                layer.gate_logit.fill_(1.0)
    return model


def config_for(family: str) -> TensorCacheConfig:
    return TensorCacheConfig(**{**CONFIG.to_dict(), "rotary": family == "gpt-oss"})


@pytest.mark.parametrize("family", [name for name in NAMES if "layer_types" not in FAMILIES[name][2]])
def test_an_untrained_memory_is_exactly_the_windowed_model(family: str) -> None:
    ids = tokens(2, 90)
    plain = make(family)
    windowed = logits(plain, tessera.Cache("sink:3 + window:24", plain), ids, (90,))
    model = attached(family, config_for(family), trained=False)
    with torch.no_grad():
        found = model(ids).logits
    torch.testing.assert_close(found, windowed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", NAMES)
def test_streams_equal_whole_sequences(family: str) -> None:
    model = attached(family, config_for(family))
    ids = tokens(2, 120)
    with torch.no_grad():
        whole = model(ids).logits
    streamed = logits(model, tessera.Cache(SPEC, model), ids, (60, 1, 1, 30, 1, 27))
    torch.testing.assert_close(streamed, whole, rtol=1e-3, atol=1e-3)
    dynamic = logits(model, None, ids, (120,))
    torch.testing.assert_close(dynamic, whole, rtol=1e-4, atol=1e-4)


def test_transformers_own_cache_gives_the_same() -> None:
    from transformers import DynamicCache

    model = attached()
    ids = tokens(2, 100)
    with torch.no_grad():
        whole = model(ids).logits
    streamed = logits(model, DynamicCache(config=model.config), ids, (50, 1, 40, 9))
    torch.testing.assert_close(streamed, whole, rtol=1e-3, atol=1e-3)


def test_the_memory_matters_beyond_the_window_only() -> None:
    model = attached()
    ids = tokens(1, 80)
    with torch.no_grad():
        on = model(ids).logits
        reading(model, False)
        off = model(ids).logits
    changed = ((on - off).abs().amax(-1)[0] > 1e-6).nonzero().flatten()
    # The first pair that is no sink leaves when the window has moved past it.
    assert changed.min() == CONFIG.window + CONFIG.sink
    assert len(changed) == 80 - CONFIG.window - CONFIG.sink


def test_no_output_depends_on_a_later_token() -> None:
    model = attached()
    ids = tokens(1, 90)
    other = ids.clone()
    other[0, 60] = (other[0, 60] + 1) % 90 + 3
    with torch.no_grad():
        difference = (model(ids).logits - model(other).logits).abs().amax(-1)[0]
    assert difference[:60].max() == 0
    assert difference[60:].min() > 0


@pytest.mark.parametrize("spec", [SPEC, None])
def test_left_padding_changes_nothing(spec: str | None) -> None:
    model = attached()
    ids = tokens(3, 100)
    pads = (0, 13, 70)
    mask = padding(pads, 100)
    cache = None if spec is None else tessera.Cache(spec, model)
    found = logits(model, cache, ids, (100,) if spec is None else (80, 1, 19), mask)
    for row, pad in enumerate(pads):
        with torch.no_grad():
            alone = model(ids[row : row + 1, pad:]).logits
        torch.testing.assert_close(found[row : row + 1, pad:], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("how", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}])
def test_generation_with_padding_and_beams(how: dict[str, Any]) -> None:
    model = attached()
    ids = tokens(2, 50)
    mask = padding((0, 20), 50)
    options = {"max_new_tokens": 30, "attention_mask": mask, **how}
    cache = tessera.Cache(SPEC, model)
    found = model.generate(ids, past_key_values=cache, **options)
    assert torch.equal(found, model.generate(ids, **options))
    assert cache.report().tiers["tc"] > 0


def test_several_turns_continue_a_cache() -> None:
    model = attached()
    cache = tessera.Cache(SPEC, model)
    first = model.generate(tokens(1, 40), past_key_values=cache, max_new_tokens=20, do_sample=False)
    more = torch.cat((first, tokens(1, 30)), dim=1)
    second = model.generate(more, past_key_values=cache, max_new_tokens=20, do_sample=False)
    assert torch.equal(second, model.generate(more, max_new_tokens=20, do_sample=False))


def test_a_cache_without_tc_leaves_the_memory_alone() -> None:
    ids = tokens(1, 90)
    plain, model = make(), attached()
    for spec in ("dense", "window:24", "sink:3 + window:24"):
        wanted = logits(plain, tessera.Cache(spec, plain), ids, (60, 30))
        torch.testing.assert_close(logits(model, tessera.Cache(spec, model), ids, (60, 30)), wanted)


def test_the_state_stays_the_same_size_and_is_saved(tmp_path: Path) -> None:
    model = attached()
    cache = tessera.Cache(SPEC, model)
    ids = tokens(2, 400)
    sizes = []
    with torch.no_grad():
        for part in ids.split(100, dim=1):
            model(part, past_key_values=cache)
            sizes.append(cache.report().tiers["tc"])
    assert len(set(sizes)) == 1
    cache.save(tmp_path / "c.safetensors")
    loaded = tessera.Cache.load(tmp_path / "c.safetensors", model)
    more = tokens(2, 20)
    assert torch.equal(logits(model, cache, more, (20,)), logits(model, loaded, more, (20,)))


def test_what_has_been_written_cannot_be_taken_back() -> None:
    model = attached()
    cache = tessera.Cache(SPEC, model)
    logits(model, cache, tokens(1, 20), (20,))
    cache.crop(-5)
    logits(model, cache, tokens(1, 40), (40,))
    with pytest.raises(ValueError, match="nothing can be taken back"):
        cache.crop(-1)
    assert cache.get_seq_length() == 55


def test_a_broken_pair_is_refused_before_it_is_written() -> None:
    model = attached()
    cache = tessera.Cache(SPEC, model)
    logits(model, cache, tokens(1, 40), (40,))
    lane = cache.layers[0].lanes[0]
    before = lane.memory.state.a.clone()
    lane.recent.keys[:, :, 1:] = torch.nan
    with pytest.raises(ValueError, match="keys must be finite"):
        logits(model, cache, tokens(1, 8), (8,))
    assert torch.equal(lane.memory.state.a, before)


def test_detaching_restores_the_model_bit_for_bit() -> None:
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = tokens(1, 60)
    with torch.no_grad():
        wanted = model(ids).logits
    tessera.attach(model, CONFIG)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "tensor_cache" not in name)
    assert all(p.requires_grad for name, p in model.named_parameters() if "tensor_cache" in name)
    tessera.detach(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation != "tessera"
    with torch.no_grad():
        assert torch.equal(model(ids).logits, wanted)


def test_only_the_memory_is_saved_and_loaded(tmp_path: Path) -> None:
    model = attached()
    ids = tokens(1, 80)
    with torch.no_grad():
        wanted = model(ids).logits
    path = tmp_path / "m.safetensors"
    tessera.save_memory(model, path)
    assert path.stat().st_size < 4 * sum(p.numel() for group in memory_parameters(model) for p in group["params"]) + 4096
    fresh = tessera.load_memory(make(), path)
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, wanted)


def test_everything_that_was_added_learns() -> None:
    model = attached(config=TensorCacheConfig(**{**CONFIG.to_dict(), "gate": "token", "rates": "token"}))
    ids = tokens(2, 100)
    model.train()
    model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        if "tensor_cache" in name:
            assert p.grad is not None, name
            assert p.grad.abs().max() > 0, name
        else:
            assert p.grad is None
    weights, gates = memory_parameters(model)
    assert gates["weight_decay"] == 0.0
    assert len(weights["params"]) + len(gates["params"]) == sum("tensor_cache" in name for name, _ in model.named_parameters())


def test_mistakes_leave_the_model_unchanged(tmp_path: Path) -> None:
    model = make()
    path = tmp_path / "m.safetensors"
    tessera.save_memory(attached(), path)
    with pytest.raises(ValueError, match="yours is"):
        tessera.load_memory(make(num_hidden_layers=3), path)
    other = tmp_path / "o.safetensors"
    tessera.Cache("dense", model).save(other)
    with pytest.raises(ValueError, match="holds no memory"):
        tessera.load_memory(model, other)
    with pytest.raises(ValueError, match="layers names 5"):
        tessera.attach(model, TensorCacheConfig(layers=(5,)))
    with pytest.raises(ValueError, match="nothing is attached"):
        tessera.detach(model)
    with pytest.raises(TypeError, match="takes a TensorCacheConfig"):
        tessera.attach(model, {"window": 4})
    with pytest.raises(ValueError, match="sliding window of its own"):
        tessera.attach(make("mistral"), CONFIG)
    with pytest.raises(ValueError, match="needs a Tensor Cache attached"):
        tessera.Cache(SPEC, model)
    assert attachment(model) is None
    tessera.attach(model, CONFIG)
    with pytest.raises(ValueError, match="attached already"):
        tessera.attach(model, CONFIG)
    with pytest.raises(ValueError, match=r"made for 'sink:3 \+ window:24 \+ tc'"):
        tessera.Cache("sink:3 + window:30 + tc", model)


def test_chosen_layers_only() -> None:
    model = tessera.attach(make(), TensorCacheConfig(window=24, layers=(-1,)))
    assert sorted(attachment(model).layers) == [1]
