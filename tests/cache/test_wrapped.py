"""Wrapped and compiled models, and caches that are copied, pickled and used by other libraries."""

from __future__ import annotations

import copy
import io
import pickle
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cache_models import FAMILIES, logits, make, padding, tokens
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import DynamicCache

import tessera
from tessera.cache_layers.deferred import DeferredKV, DeferredKVError
from tessera.tensor_cache import TensorCacheConfig
from tessera.tensor_memory import TensorMemoryConfig
from tessera.wrapped import unwrap

PACKED = "sink:4 + hqmq:4 + recent:16"
TC = "sink:2 + window:32 + tc"
SPECS = ["dense", PACKED, "sink:2 + window:32", "sink:4 + hqmq:4@64 + recent:16", TC]


def small(spec: str = PACKED, family: str = "llama") -> Any:
    """Make a model for a specification, with a Tensor Cache with nonzero output if the specification names one."""
    model = make(family)
    if "tc" in spec:
        tessera.attach(model, TensorCacheConfig(window=32, sink=2))
        opened(model)
    return model


def opened(model: Any) -> None:
    """Set nonzero weights in the memory of a model."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        for group in tessera.adapters.memory_parameters(model):
            for p in group["params"]:
                if p.dim() > 1:
                    p.normal_(0, 0.2)


def generate(model: Any, cache: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    return model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=12, do_sample=False, **kwargs)


# torch.compile


@pytest.fixture
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("way", ["model", "forward"])
@pytest.mark.parametrize("spec", SPECS)
def test_a_compiled_model_gives_the_same_tokens(spec: str, way: str) -> None:
    model = small(spec)
    ids = tokens(2, 120)
    mask = padding((0, 9), 120)
    if way == "model":
        # Its `generate` is that of the inner model, so the wrapper is called directly.
        cuts = (100, 1, 1, 17, 1)
        wanted = logits(model, tessera.Cache(spec, model), ids, cuts, mask)[mask.bool()]
        compiled = torch.compile(model, backend="eager")
        found = logits(compiled, tessera.Cache(spec, compiled), ids, cuts, mask)[mask.bool()]
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)
        return
    tokens_wanted = generate(model, tessera.Cache(spec, model), ids, attention_mask=mask)
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(generate(model, tessera.Cache(spec, model), ids, attention_mask=mask), tokens_wanted)


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("config", [TensorCacheConfig(window=32, sink=2), TensorMemoryConfig(channels=4, grid=(3, 3))])
def test_a_model_with_a_memory_and_no_cache_compiles(config: Any) -> None:
    model = tessera.attach(make(), config)
    opened(model)
    ids = tokens(2, 60)
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        found = torch.compile(model, backend="eager")(ids, use_cache=False).logits
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.usefixtures("_fresh")
def test_one_graph_is_refused_with_the_remedy() -> None:
    model = tessera.enable(make())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), pytest.raises(Exception, match="compile without fullgraph=True"):
        compiled(tokens(1, 20), past_key_values=tessera.Cache(PACKED, model))


@pytest.mark.usefixtures("_fresh")
def test_a_compiled_model_with_a_tensor_memory_goes_on_from_a_cache() -> None:
    model = tessera.attach(make(), TensorMemoryConfig(channels=4, grid=(3, 3)))
    opened(model)
    ids = tokens(2, 120)
    wanted = logits(model, tessera.Cache(PACKED, model), ids, (100, 1, 19))
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(
        logits(compiled, tessera.Cache(PACKED, compiled), ids, (100, 1, 19)), wanted, atol=2e-5, rtol=1e-5
    )


@pytest.mark.usefixtures("_fresh")
def test_a_model_compiled_and_run_before_its_cache_was_made_is_switched() -> None:
    model = make()
    ids = tokens(1, 130)
    wanted = logits(copy.deepcopy(model), DynamicCache(config=model.config), ids, (100, 1, 29))
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(ids, use_cache=False)
    cache = tessera.Cache("dense", compiled)
    torch.testing.assert_close(logits(compiled, cache, ids, (100, 1, 29)), wanted, atol=2e-5, rtol=1e-5)
    assert cache.get_seq_length() == 130


def test_a_deferred_tensor_can_be_copied_and_inspected_and_says_nothing_of_its_own() -> None:
    deferred = DeferredKV(tessera.Cache(PACKED, make()).layers[0], "key")
    bare = DeferredKV.__new__(DeferredKV)
    assert copy.copy(deferred).layer is deferred.layer
    assert copy.deepcopy(deferred).role == pickle.loads(pickle.dumps(deferred)).role == "key"
    for name in ("layer", "role", "__length_hint__"):
        with pytest.raises(AttributeError) as error:
            getattr(bare, name)
        assert not isinstance(error.value, DeferredKVError)
    assert not hasattr(deferred, "__array__")


# Attention that modifies its inputs


@pytest.mark.parametrize(
    "touch",
    [
        lambda h, x: torch.chunk(h, 2, dim=1),
        lambda h, x: x @ h,
        lambda h, x: torch.cat([x, h]),
        lambda h, x: nn.functional.scaled_dot_product_attention(x, h, h),
        lambda h, x: torch.repeat_interleave(input=h, repeats=2, dim=1),
    ],
    ids=["function", "operator", "list", "attention", "keyword"],
)
def test_torch_functions_given_a_deferred_tensor_are_told_what_to_do(touch: Callable[[Any, Tensor], Any]) -> None:
    cache = tessera.Cache(PACKED, make())
    k = torch.randn(1, 2, 3, 16)
    key, value = cache.update(k, k, 0)
    for deferred, role in ((key, "keys"), (value, "values")):
        with pytest.raises(DeferredKVError, match=rf"uses the cached {role} directly.*tessera\.disable\(model\)"):
            touch(deferred, k)


def test_another_copy_that_was_never_enabled_is_referred_to_enable() -> None:
    first, second = make(), make()
    cache = tessera.Cache(PACKED, first)
    ids = tokens(1, 40)
    for attention in ("sdpa", "eager"):
        second.set_attn_implementation(attention)
        with pytest.raises(DeferredKVError, match=rf"is '{attention}'.*tessera\.enable\(model\)"):
            logits(second, cache, ids, (40,))
        cache.reset()
    tessera.enable(second)
    assert torch.equal(logits(second, cache, ids, (40,)), logits(first, tessera.Cache(PACKED, first), ids, (40,)))


# Attention weights


@pytest.mark.parametrize("family", ["llama", "gpt-neox", "gemma2"])
def test_attention_weights_are_refused_before_anything_is_taken_in(family: str) -> None:
    model = make(family)
    model.set_attn_implementation("eager")
    ids = tokens(1, 20)
    assert len(model(ids, output_attentions=True).attentions) == 2
    cache = tessera.Cache("dense", model)
    for call in (
        lambda: model(ids, output_attentions=True, past_key_values=cache),
        lambda: model(ids, output_attentions=True, use_cache=False),
        lambda: model.base_model(ids, output_attentions=True, past_key_values=cache),
        lambda: generate(model, cache, ids, output_attentions=True, return_dict_in_generate=True),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match=r"attention weights.*tessera\.disable\(model\)"):
            call()
    assert cache.get_seq_length() == 0
    logits(model, cache, ids, (20,))
    tessera.disable(model)
    assert len(model(ids, output_attentions=True).attentions) == 2


def test_attention_weights_that_the_config_asks_for_are_refused() -> None:
    model = make()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    tessera.enable(model)
    with pytest.raises(ValueError, match="output_attentions=True"):
        model(tokens(1, 9))
    model.config.output_attentions = False
    assert model(tokens(1, 9)).logits.isfinite().all()


# Wrappers


@pytest.fixture
def _group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    # During this sleep, Gloo's threads get the interpreter's lock to release tensors; the group's destructor, which has that
    # lock, would wait for them for ever (github.com/pytorch/pytorch/issues/56297).
    time.sleep(0.2)
    dist.destroy_process_group()


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("wrap", [nn.DataParallel, DistributedDataParallel, lambda m: torch.compile(m, backend="eager")])
def test_a_cache_is_made_for_the_model_within_a_wrapper(wrap: Callable[[Any], Any], tmp_path: Any) -> None:
    model = make()
    ids = tokens(1, 120)
    wanted = logits(model, tessera.Cache(PACKED, model), ids, (100, 20))
    tessera.disable(model)
    outer = wrap(model)
    assert unwrap(outer) is model
    cache = tessera.Cache(PACKED, outer)
    assert model.config._attn_implementation == "tessera"
    assert torch.equal(logits(outer, cache, ids, (100, 20)), wanted)
    cache.save(tmp_path / "cache.safetensors")
    loaded, step = tessera.Cache.load(tmp_path / "cache.safetensors", outer), tokens(1, 1)
    assert torch.equal(logits(outer, loaded, step, (1,)), logits(outer, cache, step, (1,)))
    assert tessera.disable(outer) is outer
    assert model.config._attn_implementation != "tessera"
    assert tessera.enable(outer) is outer


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("wrap", [nn.DataParallel, DistributedDataParallel, lambda m: torch.compile(m, backend="eager")])
def test_a_wrapper_that_would_not_notice_a_memory_refuses_it(wrap: Callable[[Any], Any], tmp_path: Any) -> None:
    config, path = TensorCacheConfig(window=32), tmp_path / "memory.safetensors"
    model = tessera.attach(make(), config, freeze=False)
    outer = wrap(model)
    tessera.save_memory(outer, path)
    with pytest.raises(ValueError, match=r"tessera\.detach: .* call tessera\.detach on the model itself, before it is wrapped"):
        tessera.detach(outer)
    tessera.detach(model)
    for do in (lambda: tessera.attach(outer, config), lambda: tessera.load_memory(outer, path)):
        with pytest.raises(ValueError, match="on the model itself, before it is wrapped"):
            do()
    assert not any("tensor_cache" in name for name, _ in model.named_parameters())
    assert tessera.load_memory(model, path) is model


def test_a_model_adapted_by_peft_is_served_and_given_a_memory(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    ids = tokens(1, 120)
    model = make()
    wanted = logits(copy.deepcopy(model), DynamicCache(config=model.config), ids, (100, 20))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    assert unwrap(adapted) is model
    torch.testing.assert_close(logits(adapted, tessera.Cache("dense", adapted), ids, (100, 20)), wanted, atol=2e-5, rtol=1e-5)
    assert tessera.attach(adapted, TensorCacheConfig(window=32, sink=2)) is adapted
    tessera.save_memory(adapted, tmp_path / "memory.safetensors")
    generate(adapted, tessera.Cache(TC, adapted), ids)
    assert tessera.detach(adapted) is adapted
    tessera.load_memory(adapted, tmp_path / "memory.safetensors")


def test_prefix_tuning_which_would_not_use_the_cache_is_refused() -> None:
    peft = pytest.importorskip("peft")
    model = make()
    cache = tessera.Cache("dense", model)
    adapted = peft.get_peft_model(model, peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="PREFIX_TUNING begins every text with a DynamicCache of its own"):
        tessera.Cache("dense", adapted)
    with pytest.raises(RuntimeError, match="prefix tuning asks for it and would begin every text with a DynamicCache"):
        generate(adapted, cache, tokens(1, 9))


def test_prompt_tuning_gives_the_same_tokens() -> None:
    peft = pytest.importorskip("peft")
    model = make()
    adapted = peft.get_peft_model(model, peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    ids = tokens(1, 90)
    wanted = generate(adapted, DynamicCache(config=model.config), ids)
    assert torch.equal(generate(adapted, tessera.Cache("dense", adapted), ids), wanted)


# Copies


def through_torch(cache: Any) -> Any:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c)), through_torch],
    ids=["copy", "deepcopy", "pickle", "torch"],
)
@pytest.mark.parametrize("spec", SPECS)
def test_a_cache_that_has_seen_padding_is_copied_and_the_copy_is_independent(spec: str, copied: Callable[[Any], Any]) -> None:
    model = small(spec)
    ids, mask = tokens(2, 160), padding((0, 9), 160)
    cache = tessera.Cache(spec, model)
    # Kept alive, as a model keeps the mask of a running call.
    causal = mask[:, None, None, :120].bool() & torch.ones(120, 120, dtype=torch.bool).tril()
    with torch.no_grad():
        model(ids[:, :120], attention_mask=causal, past_key_values=cache)
    twin = copied(cache)
    assert twin.report() == cache.report()
    other = logits(model, twin, tokens(2, 40), (40,), torch.cat([mask[:, :120], mask[:, 120:]], 1))
    found = logits(model, cache, ids[:, 120:], (40,), mask)
    assert twin.get_seq_length() == cache.get_seq_length() == 160
    fresh = tessera.Cache(spec, model)
    with torch.no_grad():
        model(ids[:, :120], attention_mask=causal, past_key_values=fresh)
    assert torch.equal(found, logits(model, fresh, ids[:, 120:], (40,), mask))
    assert not torch.equal(found, other)


# Libraries that read keys


@pytest.mark.parametrize("family", [name for name in FAMILIES if name in ("llama", "gemma3", "gpt-neox")])
def test_keys_and_values_are_read_as_a_dynamic_cache_gives_them(family: str) -> None:
    model = make(family)
    ids, mask = tokens(2, 150), padding((0, 9), 150)
    theirs = DynamicCache(config=model.config)
    logits(model, theirs, ids, (130, 1, 19), mask)
    ours = tessera.Cache("dense", model)
    assert [layer.keys for layer in ours.layers] == [None, None]
    assert list(ours) == [(None, None, ours_window(layer)) for layer in ours.layers]
    logits(model, ours, ids, (130, 1, 19), mask)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read = [(*pair, window) for *pair, window in ours]
        assert torch.equal(ours.layers[0].keys, read[0][0])
    assert len([w for w in caught if "decoded anew" in str(w.message)]) == 1
    for found, wanted in zip(read, theirs, strict=True):
        assert (found[2] is None) == (wanted[2] is None)
        for x, y in zip(found[:2], wanted[:2], strict=True):
            real = mask[:, -y.shape[2] :].bool()[:, None, :, None]
            torch.testing.assert_close(x, y * real, atol=2e-5, rtol=1e-5)
    packed = tessera.Cache(PACKED, model)
    logits(model, packed, ids, (130, 1, 19), mask)
    before = packed.report()
    with pytest.warns(UserWarning, match="decoded anew"):
        read = list(packed)
    for (keys, values, _), wanted in zip(read, theirs.layers, strict=True):
        assert keys.shape == wanted.keys.shape
        assert values.dtype == wanted.values.dtype
    assert packed.report() == before
    packed.reset()
    assert packed.layers[0].values is None


def ours_window(layer: Any) -> Any:
    return None if layer.sliding is None else torch.tensor(layer.sliding)


def test_keys_are_read_in_the_middle_of_a_call_with_those_of_the_call() -> None:
    cache = tessera.Cache("dense", make(num_hidden_layers=1))
    first, second = torch.randn(2, 2, 30, 16), torch.randn(2, 2, 5, 16)
    cache.update(first, first, 0)
    deferred, _ = cache.update(second, -second, 0)
    assert torch.equal(cache.layers[0].keys, torch.cat([first, second], 2))
    assert torch.equal(cache.layers[0].values, torch.cat([first, -second], 2))
    query = torch.randn(2, 4, 5, 16)
    out, _ = tessera.attention.attention_forward(nn.Module(), query, deferred, deferred, None)
    assert out.shape == (2, 5, 4, 16)


@pytest.mark.parametrize("spec", ["window:50", "sink:4 + q4_0@128 + recent:16", TC])
def test_a_spec_that_drops_tokens_has_no_keys_of_all_slots(spec: str) -> None:
    model = small(spec)
    cache = tessera.Cache(spec, model)
    assert cache.layers[0].keys is None
    logits(model, cache, tokens(1, 30), (30,))
    with pytest.raises(RuntimeError, match=r"drops tokens.*use a spec that keeps all"):
        cache.layers[0].keys  # noqa: B018


# Crop


@pytest.mark.parametrize(
    "count", [-1.0, 1.5, "1", None, True, False, torch.tensor(-1.0), torch.tensor([-1, -2]), torch.tensor(True)]
)
def test_a_crop_by_what_is_no_whole_number_is_refused_at_once(count: Any) -> None:
    model = make()
    cache = tessera.Cache("dense", model)
    logits(model, cache, tokens(1, 20), (20,))
    with pytest.raises(TypeError, match="crop takes a whole number of tokens"):
        cache.crop(count)
    assert cache.get_seq_length() == 20
    logits(model, cache, tokens(1, 1), (1,))


@pytest.mark.parametrize("count", [-3, torch.tensor(-3), torch.tensor([-3])])
def test_a_crop_by_a_whole_number_forgets_as_many(count: Any) -> None:
    model = make()
    ids = tokens(1, 20)
    cache = tessera.Cache("dense", model)
    logits(model, cache, ids, (20,))
    cache.crop(count)
    assert cache.get_seq_length() == 17
    expected = logits(model, tessera.Cache("dense", model), ids, (17, 3))[:, 17:]
    torch.testing.assert_close(logits(model, cache, ids[:, 17:], (3,)), expected, atol=2e-5, rtol=1e-5)
