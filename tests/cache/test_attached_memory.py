"""A Tensor Cache attached to transformers models: what it changes, what it leaves unchanged, and streaming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_models import FAMILIES, logits, make, padding, tokens
from safetensors import safe_open
from safetensors.torch import save_file

import tessera
from tessera.adapters import attached_memory, memory_parameters, reading
from tessera.tensor_cache import TensorCacheConfig

CONFIG = TensorCacheConfig(window=24, sink=3, chunk=16, decay=(10, 1000))
SPEC = "sink:3 + window:24 + tc"
#: mistral and phi3-sliding have windows of their own everywhere.
NAMES = [name for name in FAMILIES if name not in ("mistral", "phi3-sliding")]


def attached(family: str = "llama", config: TensorCacheConfig = CONFIG, trained: bool = True, **changes: Any) -> Any:
    """Make a model with a memory whose output projection is nonzero."""
    model = tessera.attach(make(family, **changes), config)
    if trained:
        torch.manual_seed(7)
        with torch.no_grad():
            for layer in attached_memory(model).layers.values():
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
    # The first pair after the sinks leaves when the window has moved past it.
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


def test_several_calls_continue_a_cache() -> None:
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
    group = cache.layers[0].groups[0]
    before = group.chain.tensor_cache.state.a.clone()
    group.chain.recent.keys[:, :, 1:] = torch.nan
    with pytest.raises(ValueError, match="keys must be finite"):
        logits(model, cache, tokens(1, 8), (8,))
    assert torch.equal(group.chain.tensor_cache.state.a, before)


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
    assert attached_memory(model) is None
    tessera.attach(model, CONFIG)
    with pytest.raises(ValueError, match="attached already"):
        tessera.attach(model, CONFIG)
    with pytest.raises(ValueError, match=r"made for 'sink:3 \+ window:24 \+ tc'"):
        tessera.Cache("sink:3 + window:30 + tc", model)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_chosen_layers_only(family: str) -> None:
    config = TensorCacheConfig(**{**CONFIG.to_dict(), "layers": (-1,)})
    model, ids = attached(family, config, num_hidden_layers=2), tokens(2, 120)
    assert sorted(attached_memory(model).layers) == [1]
    with torch.no_grad():
        whole = model(ids).logits
    streamed = logits(model, tessera.Cache(SPEC, model), ids, (60, 1, 59))
    torch.testing.assert_close(streamed, whole, rtol=1e-3, atol=1e-3)
    tessera.detach(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, make(family, num_hidden_layers=2)(ids).logits)


def test_a_gpt_with_a_window_of_its_own_gets_it_back() -> None:
    from tessera.lab.models.small_gpt import GPT, GPTConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model, ids = GPT(GPTConfig("window:8", num_key_value_heads=2, head_dim=16, **sizes)).eval(), tokens(1, 60)
    with torch.no_grad():
        before = model(ids).logits
        assert not torch.equal(tessera.attach(model, TensorCacheConfig(window=24, layers=(0,)))(ids).logits, before)
        assert torch.equal(tessera.detach(model)(ids).logits, before)


@pytest.mark.parametrize("weights", [None, [1], {"a": 1}, {"a": ["x"]}, {"a": [1.0]}])
def test_a_memory_whose_header_is_damaged_is_refused(weights: Any, tmp_path: Path) -> None:
    path, model = tmp_path / "m.safetensors", make()
    tessera.save_memory(attached(), path)
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["tessera_memory"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, {"tessera_memory": json.dumps({**about, "weights": weights})})
    with pytest.raises(ValueError, match=r"holds no memory|with other weights"):
        tessera.load_memory(model, path)
    assert attached_memory(model) is None


def test_layers_that_cannot_have_a_memory_are_refused() -> None:
    for family, layers, message in (
        ("gemma2", (0,), "layers names 0, which has a sliding window"),
        ("llama", (), "names none"),
    ):
        with pytest.raises(ValueError, match=message):
            tessera.attach(make(family), TensorCacheConfig(layers=layers))
    with pytest.raises(ValueError, match="gate_init must be finite"):
        TensorCacheConfig(gate_init=float("nan"))


@pytest.mark.parametrize("options", [{}, {"gate": "token", "rates": "token"}])
def test_it_runs_in_half_precision_with_rates_in_float32(options: dict[str, Any]) -> None:
    config = TensorCacheConfig(**{**CONFIG.to_dict(), **options})
    model, ids = attached(config=config, dtype=torch.bfloat16), tokens(2, 80)
    assert model(ids, labels=ids).loss.backward() is None
    with torch.no_grad():
        assert model(ids).logits.dtype == torch.bfloat16
    found = model.generate(ids, past_key_values=tessera.Cache(SPEC, model), max_new_tokens=4, do_sample=False)
    assert found.shape == (2, 84)
    moved = attached(config=config).to(torch.bfloat16)
    for layer in attached_memory(moved).layers.values():
        assert {p.dtype for p in layer.parameters()} == {torch.float32}
        assert torch.equal(layer.memory.decay_logit, attached_memory(model).layers[0].memory.decay_logit)
    with torch.no_grad():
        assert moved(ids).logits.isfinite().all()


def test_padding_within_a_later_call_moves_no_position() -> None:
    from transformers import DynamicCache

    model = attached(config=TensorCacheConfig(**{**CONFIG.to_dict(), "window": 4, "sink": 0, "rule": "wedge"}))
    ids, mask = tokens(2, 60), padding((0, 30), 60)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    found = []
    for cuts in ((20, 40), (40, 20), (60,)):
        cache, parts, end = DynamicCache(config=model.config), [], 0
        for n in cuts:
            begin, end = end, end + n
            with torch.no_grad():
                given = {"attention_mask": mask[:, :end], "position_ids": places[:, begin:end], "past_key_values": cache}
                parts.append(model(ids[:, begin:end], **given).logits)
        found.append(torch.cat(parts, dim=1)[mask.bool()])
    torch.testing.assert_close(found[0], found[2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[1], found[2], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spec", ["window:24 + tc", None])
@torch.no_grad()
def test_a_buffer_of_positions_that_is_written_anew_moves_no_earlier_one(spec: str | None) -> None:
    from transformers import DynamicCache

    model = attached(config=TensorCacheConfig(**{**CONFIG.to_dict(), "sink": 0}))
    ids, buffer = tokens(2, 80), torch.arange(20)[None]
    cache = DynamicCache(config=model.config) if spec is None else tessera.Cache(spec, model)
    found = []
    for begin in range(0, 80, 20):
        found.append(model(ids[:, begin : begin + 20], position_ids=buffer, past_key_values=cache).logits)
        buffer += 20
    torch.testing.assert_close(torch.cat(found, dim=1), model(ids).logits, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_new_keys_that_are_not_finite_are_refused_at_once_and_nothing_is_lost() -> None:
    model, ids = attached(), tokens(1, 70)
    cache = tessera.Cache(SPEC, model)
    model(ids[:, :60], past_key_values=cache)
    with pytest.raises(ValueError, match="keys must be finite"):
        model(inputs_embeds=torch.full((1, 2, model.config.hidden_size), torch.nan), past_key_values=cache)
    found = model(ids[:, 60:], past_key_values=cache).logits
    torch.testing.assert_close(found, model(ids).logits[:, 60:], rtol=1e-3, atol=1e-3)


def test_a_memory_of_a_model_with_other_weights_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    tessera.save_memory(attached(), path)
    other = make()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1 * torch.randn_like(p))
    with pytest.raises(ValueError, match="of the same shape with other weights"):
        tessera.load_memory(other, path)
    assert attached_memory(other) is None
    assert attached_memory(tessera.load_memory(other, path, strict=False)) is not None
    assert attached_memory(tessera.load_memory(make(dtype=torch.bfloat16), path)) is not None
    broken = attached()
    with torch.no_grad():
        attached_memory(broken).layers[1].out.weight[0, 0] = torch.nan
    tessera.save_memory(broken, path)
    fresh = make()
    with pytest.raises(ValueError, match="not finite"):
        tessera.load_memory(fresh, path)
    assert attached_memory(fresh) is None


@pytest.mark.parametrize("change", [{"slots": 2}, {"slow": (0.99, 0.1)}, {"normalise_read": True}, {"rule": "outer"}])
def test_a_cache_that_was_saved_with_another_memory_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    model = attached()
    cache = tessera.Cache(SPEC, model)
    logits(model, cache, tokens(1, 40), (40,))
    cache.save(tmp_path / "cache.safetensors")
    other = attached(config=TensorCacheConfig(**{**CONFIG.to_dict(), **change}))
    with pytest.raises(ValueError, match="was saved with the memory"):
        tessera.Cache.load(tmp_path / "cache.safetensors", other)


def test_attention_that_knows_no_memory_is_not_used_unseen() -> None:
    model = attached()
    with pytest.raises(ValueError, match=r"take it away with tessera\.detach"):
        tessera.disable(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="was switched to 'sdpa'"):
        model(tokens(1, 8))
    tessera.enable(model)
    model(tokens(1, 8))


@pytest.mark.parametrize("what", ["enabled", "attached"])
def test_a_cache_with_room_for_tokens_to_come_is_read_as_it_is_filled(what: str) -> None:
    model = tessera.enable(make()) if what == "enabled" else attached()
    ids, mask = tokens(2, 60), padding((0, 13), 60)
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, cache_implementation="static")
    assert torch.equal(found, wanted)
    from transformers import StaticCache

    with torch.no_grad():
        whole = model(ids).logits
        cache = StaticCache(config=model.config, max_cache_len=90)
        parts = [model(part, past_key_values=cache).logits for part in ids.split((40, 1, 19), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-3, atol=1e-3)
