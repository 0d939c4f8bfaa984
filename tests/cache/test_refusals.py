"""What a cache refuses and with which message; and the slow path for models without Tessera's attention."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cache_models import CUTS, VOCAB, logits, make, padding, relative, tokens
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, T5ForConditionalGeneration

import tessera
from tessera.cache_layers.deferred import DeferredKVError

PACKED = "sink:4 + q4_0 + recent:16"
SLOW = "the model's attention is"

_SMALL = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.1}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_GPT = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.1, **_IDS}
#: Models that compute attention themselves: name -> (model type, arguments).
OWN_ATTENTION: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", _SMALL),
    "falcon": ("falcon", {**_SMALL, "alibi": False}),
    "falcon, new": ("falcon", {**_SMALL, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt-j": ("gptj", {**_GPT, "rotary_dim": 8}),
    "codegen": ("codegen", {**_GPT, "rotary_dim": 8}),
}


def own_attention(name: str) -> Any:
    kind, arguments = OWN_ATTENTION[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **arguments)).eval()


# Models


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("t5", ["t5", "encoder-decoder", "two caches"]),
        ("bart", ["bart", "encoder-decoder"]),
        ("whisper", ["whisper", "encoder-decoder"]),
        ("deepseek_v3", ["deepseek_v3", "latent"]),
        ("gemma3n_text", ["gemma3n_text", "keys and values of other layers"]),
        ("gemma4_text", ["gemma4_text", "differ in the shape"]),
        ("llama4_text", ["llama4_text", "'chunked_attention'"]),
        ("qwen3_next", ["qwen3_next", "'linear_attention'"]),
        ("mamba", ["mamba"]),
        ("jamba", ["jamba", "'linear_attention'"]),
    ],
)
def test_families_that_keep_something_else_are_named(kind: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match=f"tessera.Cache does not support {kind}") as error:
        tessera.Cache(PACKED, AutoConfig.for_model(kind))
    for word in words:
        assert word in str(error.value)


def test_a_refused_model_keeps_its_attention() -> None:
    config = AutoConfig.for_model(
        "t5", vocab_size=VOCAB, d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    t5 = T5ForConditionalGeneration(config)
    for model, spec in ((t5, PACKED), (make(), "sink:4 + nosuch:4"), (make(), "sink:4")):
        before = model.config._attn_implementation
        with pytest.raises(ValueError, match=r"."):
            tessera.Cache(spec, model)
        assert model.config._attn_implementation == before != "tessera"


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_a_model_that_computes_attention_itself_is_referred_to_its_config(name: str) -> None:
    model = own_attention(name)
    for do in (lambda: tessera.Cache(PACKED, model), lambda: tessera.enable(model)):
        with pytest.raises(ValueError, match="computes attention itself") as error:
            do()
        assert type(model).__name__ in str(error.value)
    with pytest.raises(ValueError, match=r"tessera\.Cache\(spec, model\.config\) works"):
        tessera.Cache(PACKED, model)


@pytest.mark.parametrize("thing", [None, "llama", {"num_hidden_layers": 2}, object()])
def test_something_else_than_a_model_is_refused(thing: Any) -> None:
    with pytest.raises(TypeError, match=f"expected a transformers model or its config, got {type(thing).__name__}"):
        tessera.Cache(PACKED, thing)


def test_a_module_that_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(ValueError, match="not a transformers model"):
        tessera.enable(nn.Linear(2, 2))
    with pytest.raises((TypeError, AttributeError), match="config"):
        tessera.Cache(PACKED, nn.Linear(2, 2))


# Arguments


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("sink:4 + hqmq4 + recent:128", ["unknown tier 'hqmq4'", "did you mean 'hqmq'"]),
        ("sink:4 + hqmq:9 + recent:128", ["'hqmq:9'"]),
        ("sink:x + dense", ["'sink:x'", "whole number"]),
        ("sink:4 + recent:64", ["what becomes of the tokens that leave 'recent'"]),
    ],
)
def test_a_mistake_in_the_spec_is_named(spec: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        tessera.Cache(spec, make().config)
    for word in words:
        assert word in str(error.value)


def test_an_unknown_prefill_is_refused() -> None:
    with pytest.raises(ValueError, match="prefill must be 'exact' or 'quantized', got 'quick'"):
        tessera.Cache(PACKED, make().config, prefill="quick")  # type: ignore[arg-type]


# Calls


def test_gradients_are_refused_and_the_cache_is_untouched() -> None:
    model = make()
    cache = tessera.Cache(PACKED, model)
    ids = tokens(1, 100)
    expected = logits(model, tessera.Cache(PACKED, model), ids, (70, 30))
    with pytest.raises(RuntimeError, match=r"keeps no gradients.*torch\.no_grad\(\)"):
        model(ids, past_key_values=cache)
    assert cache.get_seq_length() == cache.report().nbytes == 0
    first = logits(model, cache, ids[:, :70], (70,))
    with pytest.raises(RuntimeError, match="keeps no gradients"):
        model(ids[:, 70:], past_key_values=cache)
    assert torch.equal(torch.cat([first, logits(model, cache, ids[:, 70:], (30,))], 1), expected)


def test_gradient_mode_is_fine_where_nothing_needs_gradients() -> None:
    model = make().requires_grad_(False)
    ids = tokens(1, 100)
    cache = tessera.Cache(PACKED, model)
    assert torch.is_grad_enabled()
    found = model(ids, past_key_values=cache).logits
    assert torch.equal(found, logits(model, tessera.Cache(PACKED, model), ids, (100,)))


def test_attention_dropout_is_refused_until_the_model_evaluates() -> None:
    model = make(attention_dropout=0.3).train()
    cache = tessera.Cache(PACKED, model)
    ids = tokens(1, 100)
    with pytest.raises(ValueError, match=r"dropout.*call model\.eval\(\)"):
        logits(model, cache, ids, (100,))
    model.eval()
    with pytest.raises(RuntimeError, match=r"a call stopped half-way.*cache\.reset\(\)"):
        logits(model, cache, ids, (100,))
    cache.reset()
    assert torch.equal(logits(model, cache, ids, (100,)), logits(model, tessera.Cache(PACKED, model), ids, (100,)))


def test_a_model_with_more_layers_is_refused() -> None:
    cache = tessera.Cache(PACKED, make())
    with pytest.raises(ValueError, match="made for a model of 2 layers and was given keys of layer 2"):
        logits(tessera.enable(make(num_hidden_layers=3)), cache, tokens(1, 10), (10,))


def test_a_model_with_fewer_layers_is_refused_at_its_second_call() -> None:
    model = make()
    cache = tessera.Cache(PACKED, make(num_hidden_layers=3))
    tessera.enable(model)
    with pytest.raises(RuntimeError, match="fewer layers than the one it was made for"):
        logits(model, cache, tokens(1, 20), (10, 10))


@pytest.mark.parametrize("changes", [{"num_key_value_heads": 4}, {"head_dim": 32}])
def test_a_model_of_another_shape_is_refused(changes: dict[str, int]) -> None:
    cache = tessera.Cache(PACKED, make())
    with pytest.raises(ValueError, match=r"was given keys .* made for a model with \(batch, 2, tokens, 16\)"):
        logits(tessera.enable(make(**changes)), cache, tokens(1, 10), (10,))


def test_another_batch_is_refused() -> None:
    model = make()
    cache = tessera.Cache(PACKED, model)
    logits(model, cache, tokens(2, 10), (10,))
    with pytest.raises(ValueError, match=r"holds 2 rows and was given 3.*batch_repeat_interleave"):
        logits(model, cache, tokens(3, 1), (1,))


def test_masks_that_do_more_than_hide_are_refused() -> None:
    model = make()
    mask = torch.zeros(1, 1, 10, 10).masked_fill(~torch.ones(10, 10, dtype=torch.bool).tril(), -torch.inf)
    found = logits(model, tessera.Cache(PACKED, model), tokens(1, 10), (10,), attention_mask=mask)
    assert torch.isfinite(found).all()
    mask[..., 5, 2] = 0.5
    with pytest.raises(ValueError, match="adds a bias to the scores"):
        logits(model, tessera.Cache(PACKED, model), tokens(1, 10), (10,), attention_mask=mask)


def test_masks_of_another_size_are_refused() -> None:
    model = make()
    mask = torch.ones(1, 1, 10, 9, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask of shape \(1, 1, 10, 9\) does not fit 1 rows, 10 queries and 10 slots"):
        logits(model, tessera.Cache(PACKED, model), tokens(1, 10), (10,), attention_mask=mask)


@pytest.mark.parametrize(
    "touch", [lambda h: h.shape, lambda h: h[:, :, -1], lambda h: h.transpose(1, 2)], ids=["attribute", "index", "method"]
)
@pytest.mark.parametrize("role", ["key", "value"])
def test_attention_that_touches_a_deferred_tensor_is_told_what_to_do(role: str, touch: Callable[[Any], Any]) -> None:
    cache = tessera.Cache(PACKED, make())
    k = torch.randn(1, 2, 3, 16)
    deferred = cache.update(k, k, 0)[role == "value"]
    with pytest.raises(DeferredKVError, match=rf"uses the cached {role}s directly.*tessera\.disable\(model\)"):
        touch(deferred)


def test_attention_called_twice_for_one_update_is_refused() -> None:
    cache = tessera.Cache(PACKED, make())
    k = torch.randn(1, 2, 3, 16)
    key, value = cache.update(k, k, 0)
    query = torch.randn(1, 4, 3, 16)
    tessera.attention.attention_forward(nn.Module(), query, key, value, None)
    with pytest.raises(RuntimeError, match="layer 0: attention was called twice"):
        tessera.attention.attention_forward(nn.Module(), query, key, value, None)


@pytest.mark.parametrize(("spec", "words"), [("window:50", "activate_past_recording"), ("q4_0@64", "cannot be cropped")])
def test_a_crop_into_what_was_dropped_is_refused_and_changes_nothing(spec: str, words: str) -> None:
    model = make()
    cache = tessera.Cache(spec, model)
    logits(model, cache, tokens(1, 400), (400,))
    untouched = copy.deepcopy(cache)
    with pytest.raises(ValueError, match=words):
        cache.crop(-300)
    step = tokens(1, 1)
    assert cache.report() == untouched.report()
    assert torch.equal(logits(model, cache, step, (1,)), logits(model, untouched, step, (1,)))


def test_if_one_layer_refuses_a_crop_no_layer_is_cropped() -> None:
    """The layer that can be cropped comes before the one that cannot."""
    model = make("gemma3", layer_types=["full_attention", "sliding_attention"])
    cache = tessera.Cache("dense", model)
    logits(model, cache, tokens(1, 200), (200,))
    with pytest.raises(ValueError, match="layer 1 keeps a window"):
        cache.crop(-100)
    assert {layer.seen for layer in cache.layers} == {200}
    logits(model, cache, tokens(1, 1), (1,))


# Attention that is not Tessera's


def warned(call: Callable[[], Tensor]) -> tuple[Tensor, list[str]]:
    """Return the result, and the warnings about the slow path."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [str(warning.message) for warning in caught if SLOW in str(warning.message)]


@pytest.mark.parametrize("spec", ["dense", PACKED])
@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_other_attention_is_given_decoded_tokens_and_says_so_once(name: str, spec: str) -> None:
    model = own_attention(name)
    ids = tokens(2, sum(CUTS))
    expected = logits(model, DynamicCache(config=model.config), ids)
    cache = tessera.Cache(spec, model.config)
    found, messages = warned(lambda: logits(model, cache, ids))
    assert len(messages) == 1
    assert "decoded into dense keys and values for every call" in messages[0]
    assert "tessera.enable(model)" in messages[0]
    if spec == "dense":
        assert torch.equal(found, expected)
    else:
        assert relative(found, expected) < 0.2
        assert cache.report().tiers["q4_0"] > 0


@pytest.mark.parametrize("pads", [(0, 0, 0), (30, 150, 0)], ids=["whole rows", "left padding"])
@pytest.mark.parametrize("spec", ["dense", PACKED])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_the_slow_way_gives_what_the_fast_one_does(family: str, attention: str, spec: str, pads: tuple[int, ...]) -> None:
    """Padding is packed like tokens on the slow path, because only Tessera's attention receives the mask."""
    model = make(family)
    ids, mask = tokens(3, sum(CUTS)), padding(pads, sum(CUTS))
    fast = logits(model, tessera.Cache(spec, model), ids, mask=mask)[mask.bool()]
    model = make(family)
    model.set_attn_implementation(attention)
    slow, messages = warned(lambda: logits(model, tessera.Cache(spec, model.config), ids, mask=mask)[mask.bool()])
    assert len(messages) == 1
    assert f"{SLOW} {attention!r}" in messages[0]
    assert relative(slow, fast) < (0.2 if spec == PACKED and any(pads) else 1e-4)


def test_the_fast_way_never_warns() -> None:
    model = make()
    _, messages = warned(lambda: logits(model, tessera.Cache(PACKED, model), tokens(1, sum(CUTS))))
    assert messages == []


def test_each_cache_warns_for_itself() -> None:
    model = make()
    for _ in range(2):
        cache = tessera.Cache(PACKED, model.config)
        assert len(warned(lambda cache=cache: logits(model, cache, tokens(1, 50), (40, 10)))[1]) == 1


@pytest.mark.parametrize("pads", [(0, 0), (0, 100)], ids=["whole rows", "left padding"])
@pytest.mark.parametrize("spec", ["dense", PACKED])
@pytest.mark.parametrize("first", ["fast", "slow"])
def test_attention_may_be_switched_in_the_middle(first: str, spec: str, pads: tuple[int, ...]) -> None:
    model = make()
    ids, mask = tokens(2, 300), padding(pads, 300)
    expected = logits(model, tessera.Cache(spec, model), ids, (150, 50, 100), mask)[mask.bool()]
    cache = tessera.Cache(spec, model)

    def alternately() -> Tensor:
        out = []
        for number, (start, stop) in enumerate(((0, 150), (150, 200), (200, 300))):
            (tessera.enable if (number % 2 == 0) == (first == "fast") else tessera.disable)(model)
            out.append(logits(model, cache, ids[:, start:stop], (stop - start,), mask[:, :stop]))
        return torch.cat(out, 1)[mask.bool()]

    found, messages = warned(alternately)
    assert len(messages) == 1
    assert relative(found, expected) < (0.2 if spec == PACKED and any(pads) else 1e-4)


@pytest.mark.parametrize("spec", ["window:50", "sink:4 + q4_0@128 + recent:16"])
def test_specs_that_drop_tokens_need_our_attention(spec: str) -> None:
    model = make()
    cache = tessera.Cache(spec, model.config)
    with pytest.raises(RuntimeError, match=r"drops tokens.*tessera\.enable\(model\)"):
        logits(model, cache, tokens(1, 10), (10,))
    cache.reset()
    tessera.enable(model)
    logits(model, cache, tokens(1, 200), (200,))
    assert cache.get_seq_length() == 200
