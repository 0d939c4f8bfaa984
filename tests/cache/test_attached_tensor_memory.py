"""A Tensor Memory attached to causal transformers models: what it changes, what it leaves unchanged, and streaming."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_models import FAMILIES, logits, make, padding, tokens
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, Olmo2Config, Olmo2ForCausalLM

import tessera
from tessera.adapters import attached_memory, memory_parameters, reading
from tessera.cache_layers.truncated_bptt import TruncatedBPTTCache
from tessera.tensor_cache import TensorCacheConfig
from tessera.tensor_memory import TensorMemoryConfig

CONFIG = TensorMemoryConfig(channels=4, grid=(3, 3, 3), chunk=1)
#: gpt-neox computes attention and MLP side by side.
NAMES = [name for name in FAMILIES if name != "gpt-neox"]


def attached(family: str = "llama", config: TensorMemoryConfig = CONFIG, **changes: Any) -> Any:
    """Make a model with a memory whose output is nonzero."""
    return excite(tessera.attach(make(family, **changes), config))


def excite(model: Any) -> Any:
    """Return the model after setting its memory's weights so that they have an effect."""
    shared = attached_memory(model).shared
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(7)
        shared.out_proj.weight.normal_(0, 2)
        shared.content_net.weight.normal_(0, 0.5)
        shared.coord_net.weight.normal_(0, 0.3)
    return model


def whole(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits.float()


@pytest.mark.parametrize("family", NAMES)
def test_at_first_the_model_is_what_it_was_and_then_it_is_not(family: str) -> None:
    ids, plain = tokens(2, 50), make(family)
    wanted = whole(plain, ids)
    assert torch.equal(whole(tessera.attach(plain, CONFIG), ids), wanted)
    found = attached(family)
    assert (whole(found, ids) - wanted).abs().max() > 1e-2
    reading(found, False)
    assert torch.equal(whole(found, ids), wanted)


@pytest.mark.parametrize("layers", [2, 4])
@pytest.mark.parametrize("chunk", [1, 3])
def test_no_output_depends_on_a_later_token(layers: int, chunk: int) -> None:
    model = attached(config=TensorMemoryConfig.paper(channels=4, grid=(3, 3, 3), chunk=chunk), num_hidden_layers=layers)
    ids = tokens(1, 40)
    other = ids.clone()
    other[0, 29] = (other[0, 29] + 1) % 90 + 3
    difference = (whole(model, ids) - whole(model, other)).abs().amax(-1)[0]
    assert difference[:29].max() == 0
    assert difference[29] > 0


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-oss"])
def test_streams_equal_whole_sequences(family: str) -> None:
    model = attached(family, TensorMemoryConfig(channels=4, grid=(3, 3, 3), chunk=4))
    ids = tokens(2, 70)
    wanted = whole(model, ids)
    for cache in (DynamicCache(config=model.config), tessera.Cache("dense", model)):
        torch.testing.assert_close(logits(model, cache, ids, (45, 1, 17, 7)), wanted, rtol=1e-3, atol=1e-3)


def test_a_cache_that_the_model_makes_itself_goes_on_too() -> None:
    model, ids = attached(), tokens(2, 30)
    with torch.no_grad():
        first = model(ids[:, :20])
        second = model(ids[:, 20:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat((first.logits, second.logits), 1), whole(model, ids), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spec", [None, "dense", "sink:2 + window:200"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_left_padding_is_never_written(spec: str | None, chunk: int) -> None:
    model = attached(config=TensorMemoryConfig(channels=4, grid=(3, 3, 3), chunk=chunk))
    ids, pads = tokens(4, 60), (0, 7, 33, 7)
    cache = DynamicCache(config=model.config) if spec is None else tessera.Cache(spec, model)
    found = logits(model, cache, ids, (30, 20, 1, 9), padding(pads, 60))
    for row, pad in enumerate(pads):
        alone = whole(model, ids[row : row + 1, pad:])
        torch.testing.assert_close(found[row : row + 1, pad:], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2, "top_k": 1}])
def test_generation_with_a_cache_is_generation_without(how: dict[str, Any]) -> None:
    model, ids = attached(), tokens(2, 12)
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": padding((0, 5), 12), **how}
    wanted = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, **options), wanted)
    assert torch.equal(model.generate(ids, past_key_values=tessera.Cache("dense", model), **options), wanted)
    reading(model, False)
    assert not torch.equal(model.generate(ids, **options), wanted)


def test_several_calls_continue_a_cache_and_a_copy_of_it() -> None:
    model, cache = attached(), None
    cache = DynamicCache(config=model.config)
    first = model.generate(tokens(1, 20), past_key_values=cache, max_new_tokens=10, do_sample=False)
    twin = copy.deepcopy(cache)
    for own in (cache, twin):
        more = torch.cat((first, tokens(1, 5)), dim=1)
        found = model.generate(more, past_key_values=own, max_new_tokens=8, do_sample=False)
        assert torch.equal(found, model.generate(more, max_new_tokens=8, do_sample=False, use_cache=False))


def test_rows_are_chosen_and_repeated_with_the_cache() -> None:
    model, ids = attached(), tokens(3, 24)
    cache = DynamicCache(config=model.config)
    logits(model, cache, ids[:, :20], (20,), padding((0, 6, 2), 20))
    cache.batch_select_indices(torch.tensor([2, 1]))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 1]))
    rows = torch.tensor([1, 2, 2, 2])
    more = ids[rows, 20:]
    found = logits(model, cache, more, (4,), padding((6, 2, 2, 2), 24))
    for i, (row, pad) in enumerate(zip(rows.tolist(), (6, 2, 2, 2), strict=True)):
        alone = whole(model, ids[row : row + 1, pad:])[:, -4:]
        torch.testing.assert_close(found[i : i + 1], alone, rtol=1e-3, atol=1e-3)


def test_a_cache_that_does_not_fit_is_refused_and_a_reset_one_begins_anew() -> None:
    model, ids = attached(), tokens(1, 20)
    cache = DynamicCache(config=model.config)
    wanted = logits(model, cache, ids, (20,))
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :-3], layer.values[:, :, :-3]
    with pytest.raises(ValueError, match="holds 17 tokens, of which the Tensor Memory has read 20"):
        logits(model, cache, ids[:, 17:], (3,))
    cache = tessera.Cache("dense", model)
    logits(model, cache, ids, (20,))
    cache.reset()
    torch.testing.assert_close(logits(model, cache, ids, (20,)), wanted)
    plain = DynamicCache(config=model.config)
    tessera.detach(model)
    logits(model, plain, ids, (20,))
    tessera.attach(model, CONFIG)
    with pytest.raises(ValueError, match="holds 20 tokens, of which the Tensor Memory has read 0"):
        logits(model, plain, ids, (1, 19))


def test_segments_with_a_state_learn_what_the_whole_does() -> None:
    from tessera.lab.models.small_gpt import GPT, GPTConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = GPT(GPTConfig(attention="window:8", num_key_value_heads=2, head_dim=16, initializer_range=0.2, **sizes))
    tessera.attach(model, TensorMemoryConfig.paper(channels=4, grid=(3, 3), forget_bias=3.0), freeze=False)
    ids = tokens(2, 24)
    model(ids, use_cache=False).logits.square().mean().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    cache = TruncatedBPTTCache(model)
    parts = [model(part, past_key_values=cache).logits for part in ids.split(12, dim=1)]
    torch.cat(parts, 1).square().mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-3, atol=1e-5, msg=name)
    model(ids, past_key_values=cache)
    cache.detach()
    second = model(ids, past_key_values=cache).logits
    assert second.requires_grad
    second.sum().backward()


def test_detaching_restores_the_model_bit_for_bit() -> None:
    model, ids = make(), tokens(1, 30)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = whole(model, ids)
    attached_model = tessera.attach(model, TensorMemoryConfig.paper(channels=4, grid=(3, 3)))
    assert not torch.equal(whole(model, ids), wanted)
    twin = copy.deepcopy(attached_model)
    assert torch.equal(whole(twin, ids), whole(model, ids))
    assert all(p.requires_grad == ("tensor_memory" in name) for name, p in model.named_parameters())
    tessera.detach(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(whole(model, ids), wanted)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(whole(tessera.detach(twin), ids), wanted)


def test_only_the_memory_is_saved_and_loaded(tmp_path: Path) -> None:
    model, ids, path = attached(), tokens(1, 40), tmp_path / "m.safetensors"
    tessera.save_memory(model, path)
    size = 4 * sum(p.numel() for group in memory_parameters(model) for p in group["params"])
    assert size < path.stat().st_size < size + 8192
    fresh = tessera.load_memory(make(), path)
    assert attached_memory(fresh).config == CONFIG
    assert torch.equal(whole(fresh, ids), whole(model, ids))
    with pytest.raises(ValueError, match="yours is"):
        tessera.load_memory(make(num_hidden_layers=3), path)
    tensors = {name: p for name, p in attached_memory(model).shared.named_parameters()}
    del tensors["out_proj.bias"]
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file({f"shared.{name}": p.detach() for name, p in tensors.items()}, path, header)
    model = make()
    with pytest.raises(ValueError, match=r"is damaged: 'out_proj\.bias' of all layers is missing"):
        tessera.load_memory(model, path)
    assert attached_memory(model) is None


def test_everything_that_was_added_learns() -> None:
    model, ids = attached(config=TensorMemoryConfig(channels=4, grid=(3, 3, 3))).train(), tokens(2, 40)
    model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.abs().max() > 0)) == ("tensor_memory" in name), name
    weights, gates = memory_parameters(model)
    assert len(gates["params"]) == 2
    assert gates["weight_decay"] == 0.0
    assert len(weights["params"]) == sum("tensor_memory" in name for name, _ in model.named_parameters()) - 2


def test_it_runs_in_half_precision_with_its_own_weights_in_float32() -> None:
    model = tessera.attach(make(dtype=torch.bfloat16), TensorMemoryConfig.paper(channels=4, grid=(3, 3)))
    assert {p.dtype for p in attached_memory(model).shared.parameters()} == {torch.float32}
    assert model(tokens(1, 20)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(("every", "layers"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3]), (5, [4])])
def test_every_so_manyth_layer_gets_one(every: int, layers: list[int]) -> None:
    model = tessera.attach(make(num_hidden_layers=5), TensorMemoryConfig(every=every))
    assert sorted(attached_memory(model).layers) == layers


def test_the_gate_and_the_place_are_the_papers() -> None:
    """The input of the MLP and of the residual stream is x + sigmoid(gate) memory(LayerNorm(x))."""
    model = attached(config=TensorMemoryConfig.paper(channels=4, grid=(3, 3, 3)), num_hidden_layers=1)
    layer, done, kept = model.model.layers[0], attached_memory(model), {}
    layer.self_attn.register_forward_hook(lambda _, __, out: kept.update(attention=out[0]))
    layer.register_forward_pre_hook(lambda _, args: kept.update(x=args[0]))
    layer.register_forward_hook(lambda _, __, out: kept.update(out=out))
    whole(model, tokens(2, 20))
    with torch.no_grad():
        x = kept["x"] + kept["attention"]
        assert float(done.layers[0].gate_logit) == -2
        read, _ = done.shared.reference(done.layers[0].norm(x))
        y = x + torch.sigmoid(torch.tensor(-2.0)) * read
        # Its norm without the hooks.
        wanted = y + layer.mlp(layer.post_attention_layernorm.forward(y))
    torch.testing.assert_close(kept["out"], wanted, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_done_is_refused_and_leaves_the_model_alone() -> None:
    with pytest.raises(ValueError, match="side by side"):
        tessera.attach(make("gpt-neox"), CONFIG)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    olmo = Olmo2ForCausalLM(Olmo2Config(**sizes))
    with pytest.raises(ValueError, match="norms behind its attention"):
        tessera.attach(olmo, CONFIG)
    assert olmo.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in olmo.modules())
    model = make()
    with pytest.raises(ValueError, match="would see later tokens"):
        tessera.attach(model, TensorMemoryConfig(threaded=True))
    with pytest.raises(ValueError, match="anchored=True"):
        tessera.attach(model, TensorMemoryConfig(anchored=True))
    with pytest.raises(ValueError, match="every=3 leaves no layer for a memory in a model of 2"):
        tessera.attach(model, TensorMemoryConfig(every=3))
    with pytest.raises(ValueError, match="neither a causal language model"):
        tessera.attach(model.model, CONFIG)
    with pytest.raises(ValueError, match="neither a model of transformers nor a ViT of timm"):
        tessera.attach(torch.nn.Linear(2, 2), CONFIG)
    assert attached_memory(model) is None
    tessera.attach(model, CONFIG)
    with pytest.raises(ValueError, match="attached already"):
        tessera.attach(model, TensorCacheConfig())
    with pytest.raises(ValueError, match="needs a Tensor Cache attached"):
        tessera.Cache("window:8 + tc", model)
    model.train()
    # Its name before transformers 5.20.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(tokens(1, 8))


def test_gpt2_whose_layers_are_blocks() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()
    tessera.attach(model, TensorMemoryConfig.paper(channels=4, grid=(3, 3)))
    ids = tokens(2, 30)
    found = logits(model, DynamicCache(config=model.config), ids, (20, 1, 9))
    torch.testing.assert_close(found, whole(model, ids), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spec", [None, "dense"])
@torch.no_grad()
def test_embeddings_that_are_not_finite_leave_the_cache_usable(spec: str | None) -> None:
    model, ids = attached(), tokens(1, 12)
    cache = DynamicCache(config=model.config) if spec is None else tessera.Cache(spec, model)
    model(ids[:, :10], past_key_values=cache)
    with pytest.raises(ValueError, match="inputs_embeds must be finite"):
        model(inputs_embeds=torch.full((1, 2, model.config.hidden_size), torch.nan), past_key_values=cache)
    torch.testing.assert_close(model(ids[:, 10:], past_key_values=cache).logits.float(), whole(model, ids)[:, 10:])
