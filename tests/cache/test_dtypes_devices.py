"""Caches and memories in all dtypes and on all devices of a model: autocast, half precision, offloading."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from cache_models import make, tokens
from safetensors import safe_open
from test_tensor_memory_calls import streams
from torch import Tensor, nn
from transformers import DynamicCache

import tessera
from tessera.adapters import attached_memory
from tessera.codecs import Packed, get
from tessera.devices import device_of, layer_devices, weights
from tessera.tensor_cache import TensorCacheConfig
from tessera.tensor_memory import TensorMemoryConfig

HALVES = (torch.bfloat16, torch.float16)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
TC = TensorCacheConfig(window=24, sink=3, slow=(0.99, 0.5), slots=2, rates="token", gate="token", normalise_read=True)
TM = TensorMemoryConfig(channels=4, grid=(3, 3), chunk=2, projection="full", coordinates="separate")
MEMORIES = pytest.mark.parametrize("config", [TC, TM], ids=["tc", "tm"])
SPECS = (
    "dense",
    "sink:4 + window:50",
    "sink:4 + hqmq:3 + recent:16",
    "kivi:4",
    "q4_0@64 + recent:8",
    "sink:3 + window:24 + tc",
)


def autocast(dtype: torch.dtype | None) -> Any:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def trained(model: Any) -> Any:
    """Return a memory with weights that have an effect, the same for every model."""
    numbers = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for part in attached_memory(model).modules().values():
            for name, p in sorted(part.named_parameters()):
                p.copy_(torch.randn(p.shape, generator=numbers, dtype=torch.float32) * 0.3 + (name == "norm.weight"))
    return model


def model_for(spec: str) -> Any:
    return trained(tessera.attach(make(), TC)) if "tc" in spec else make()


@torch.no_grad()
def run(model: Any, cache: Any, ids: Tensor, dtypes: tuple[torch.dtype | None, ...]) -> Tensor:
    """Return the logits of calls on equal parts of `ids`, each under autocast to one of `dtypes`, or without."""
    out = []
    for part, dtype in zip(ids.chunk(len(dtypes), dim=1), dtypes, strict=True):
        with autocast(dtype):
            out.append(model(part, past_key_values=cache).logits.float())
    return torch.cat(out, dim=1)


def tensors(cache: tessera.Cache) -> list[Tensor]:
    return [x for layer in cache.layers for tier in layer.buffers().values() for x in tier]


# Dtypes of keys and values

MIXES = [(torch.bfloat16,), (torch.float16, None), (None, torch.bfloat16), (torch.bfloat16, None, torch.float16)]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("spec", SPECS)
def test_a_cache_filled_under_autocast_is_saved_and_loaded(spec: str, mix: Any, tmp_path: Path) -> None:
    model, ids = model_for(spec), tokens(2, 180)
    cache = tessera.Cache(spec, model)
    run(model, cache, ids, mix)
    assert cache.layers[0].dtype == torch.float32
    assert cache.layers[0].value_dtype == (torch.float32 if None in mix else mix[0])
    cache.save(tmp_path / "c")
    loaded = tessera.Cache.load(tmp_path / "c", model)
    assert loaded.report().elements == cache.report().elements
    assert loaded.report().dense_nbytes == cache.report().dense_nbytes
    more = tokens(2, 90)
    for dtype in (None, torch.bfloat16, None):
        assert torch.equal(run(model, loaded, more, (dtype,)), run(model, cache, more, (dtype,)))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("switched", [True, False])
def test_no_token_is_rounded_to_the_dtype_of_another(switched: bool, mix: Any) -> None:
    """In any order of dtypes, "dense" stores the same keys and values as transformers' own cache."""
    model, ids = make(), tokens(2, 60)
    own, cache = DynamicCache(), tessera.Cache("dense", model)
    if not switched:
        tessera.disable(model)
    update = cache.update

    def both(k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        own.update(k.clone(), v.clone(), layer_idx)
        return update(k, v, layer_idx, *args, **kwargs)

    cache.update = both  # type: ignore[method-assign]
    with nullcontext() if switched else pytest.warns(UserWarning, match="dense keys and values"):
        run(model, cache, ids, mix)
    for mine, theirs in zip(cache.layers, own.layers, strict=True):
        held = mine.groups[0].chain.recent
        assert torch.equal(held.keys, theirs.keys)
        assert torch.equal(held.values.to(theirs.values.dtype), theirs.values)
    assert cache.report().dense_nbytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in own.layers)


def test_decoded_values_keep_a_dtype_wider_than_that_of_the_keys() -> None:
    model = make()
    cache = tessera.Cache("dense", model.config)
    k, v = torch.randn(1, 2, 9, 16).bfloat16(), torch.randn(1, 2, 9, 16)
    with pytest.warns(UserWarning, match="dense keys and values"):
        keys, values = cache.update(k, v, 0)
    assert torch.equal(keys, k)
    assert torch.equal(values, v)


def test_pages_of_two_dtypes_join_to_the_wider() -> None:
    codec, x = get("q8_0"), torch.randn(1, 2, 128, 32)
    half, full = codec.encode(x[:, :, :64].bfloat16(), "key"), codec.encode(x[:, :, 64:], "key")
    for parts, place in (([half, full], 1), ([full, half], 0)):
        whole = Packed.cat(parts)
        assert whole.dtype == torch.float32
        assert torch.equal(whole.decode().split(64, 2)[place], full.decode())


@pytest.mark.parametrize("spec", ["int:4", "scalar:4", "kivi:4", "fp8:scaled", "hqmq:s96_r4"])
@pytest.mark.parametrize("kept", HALVES)
def test_scales_in_half_precision_are_joined_under_autocast_to_the_other(spec: str, kept: torch.dtype) -> None:
    x = torch.randn(1, 2, 128, 32).to(kept)
    parts = [get(spec).encode(part, "value") for part in x.split(64, 2)]
    wanted = Packed.cat(parts).decode()
    for dtype in HALVES:
        with torch.autocast("cpu", dtype):
            assert torch.equal(Packed.cat(parts).decode(), wanted)


def test_a_file_names_a_second_dtype_only_if_values_have_another(tmp_path: Path) -> None:
    """Files from before values had a separate dtype can therefore still be read."""
    for dtype, mix, wanted in (
        (torch.bfloat16, None, ("bfloat16", None)),
        (torch.float32, None, ("float32", None)),
        (torch.float32, torch.float16, ("float32", "float16")),
    ):
        model = make(dtype=dtype)
        cache = tessera.Cache("sink:4 + window:50", model)
        run(model, cache, tokens(1, 70), (mix,))
        cache.save(tmp_path / "c")
        with safe_open(tmp_path / "c", "pt") as file:
            header = json.loads(file.metadata()["tessera_cache"])
        assert header["format"] == 3
        assert [(layer["dtype"], layer.get("value_dtype")) for layer in header["layers"]] == [wanted] * 2


def test_a_cache_that_was_reset_is_saved_and_loaded_as_a_new_one(tmp_path: Path) -> None:
    model = make()
    cache = tessera.Cache("dense", model)
    run(model, cache, tokens(3, 20), (None,))
    cache.reset()
    cache.save(tmp_path / "c")
    loaded, ids = tessera.Cache.load(tmp_path / "c", model), tokens(2, 20)
    assert torch.equal(run(model, loaded, ids, (None,)), run(model, tessera.Cache("dense", model), ids, (None,)))


# Memories in float32


def states(model: Any, cache: Any) -> list[Tensor]:
    """Return the floating-point tensors of a memory's state, without the model's pending keys and values."""
    if attached_memory(model).kind == "TensorMemory":
        found = [state for stream in streams(cache) for _, state in stream.groups]
        return [x for state in found if state is not None for x in state.tensors().values()]
    found = [
        group.chain.tensor_cache.state
        for layer in cache.layers
        for group in layer.groups
        if group.chain.tensor_cache is not None
    ]
    return [x for state in found for x in (state.a, state.slow, state.z)]


def cache_for(model: Any) -> tessera.Cache:
    return tessera.Cache("sink:3 + window:24 + tc" if attached_memory(model).kind == "TensorCache" else "dense", model)


@MEMORIES
@pytest.mark.parametrize("default", list(DTYPES))
def test_memories_are_the_same_in_any_default_dtype(config: Any, default: str) -> None:
    ids = tokens(2, 80)
    wanted = run(model := trained(tessera.attach(make(), config)), cache_for(model), ids, (None, None))
    numbers = make().state_dict()
    with default_dtype(DTYPES[default]):
        plain = make()
        plain.load_state_dict(numbers)  # its weights were drawn in that dtype
        model = tessera.attach(plain, config)
        assert {p.dtype for part in attached_memory(model).modules().values() for p in part.parameters()} == {torch.float32}
        cache = cache_for(trained(model))
        found = run(model, cache, ids, (None, None))
        assert {x.dtype for x in states(model, cache)} == {torch.float32}
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@MEMORIES
@pytest.mark.parametrize("how", ["half", "bfloat16", "double", "float"])
@pytest.mark.parametrize("before", [True, False])
def test_parameters_and_states_are_float32_whatever_the_model_is_cast_to(config: Any, how: str, before: bool) -> None:
    plain = make()
    if before:
        getattr(plain, how)()
    model = trained(tessera.attach(plain, config))
    kept = {name: p.clone() for part in attached_memory(model).modules().values() for name, p in part.named_parameters()}
    if not before:
        getattr(model, how)()
    dtype = next(model.parameters()).dtype
    for part in attached_memory(model).modules().values():
        for p in part.parameters():
            assert p.dtype == torch.float32
    last = {name: p for part in attached_memory(model).modules().values() for name, p in part.named_parameters()}
    assert all(torch.equal(last[name], p) for name, p in kept.items())
    for mix in ((None, None), (torch.bfloat16, None)):
        cache, ids = cache_for(model), tokens(2, 80)
        with torch.no_grad():
            for part, cast in zip(ids.chunk(2, dim=1), mix, strict=True):
                with autocast(cast):
                    out = model(part, past_key_values=cache).logits
        assert out.dtype == dtype
        assert out.isfinite().all()
        assert states(model, cache)
        assert {x.dtype for x in states(model, cache)} == {torch.float32}


# Offloaded models


def offloaded(model: Any, **how: Any) -> Any:
    return accelerate.cpu_offload(model, execution_device="cpu", **how)


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("spec", SPECS[:3])
def test_a_cache_of_an_offloaded_model_is_loaded_where_the_model_computes(spec: str, buffers: bool, tmp_path: Path) -> None:
    model, ids = offloaded(make(), offload_buffers=buffers), tokens(2, 150)
    assert next(model.parameters()).is_meta
    cache = tessera.Cache(spec, model)
    run(model, cache, ids, (None,))
    cache.save(tmp_path / "c")
    loaded = tessera.Cache.load(tmp_path / "c", model)
    assert {x.device.type for x in tensors(loaded)} == {"cpu"}
    more = tokens(2, 10)
    assert torch.equal(run(model, loaded, more, (None,)), run(model, cache, more, (None,)))


@MEMORIES
@pytest.mark.parametrize("buffers", [False, True])
def test_a_memory_of_an_offloaded_model_computes_what_it_does_in_the_whole_one(
    config: Any, buffers: bool, tmp_path: Path
) -> None:
    ids = tokens(2, 80)
    whole = trained(tessera.attach(make(), config))
    wanted = run(whole, cache_for(whole), ids, (None, None))
    model = trained(tessera.attach(offloaded(make(), offload_buffers=buffers), config))
    assert {p.device.type for part in attached_memory(model).modules().values() for p in part.parameters()} == {"cpu"}
    assert torch.equal(run(model, cache_for(model), ids, (None, None)), wanted)
    # Save from each and load into the other; both have the same fingerprint of weights.
    for name, source, target in (("there", model, make()), ("back", whole, offloaded(make()))):
        tessera.save_memory(source, tmp_path / name)
        loaded = tessera.load_memory(target, tmp_path / name)
        assert torch.equal(run(loaded, cache_for(loaded), ids, (None, None)), wanted)
    other = offloaded(make(num_attention_heads=4, tie_word_embeddings=False).apply(_shuffle))
    with pytest.raises(ValueError, match="with other weights"):
        tessera.load_memory(other, tmp_path / "there")


def _shuffle(module: nn.Module) -> None:
    for p in module.parameters(recurse=False):
        p.data = p.data.flip(0)


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_of_an_offloaded_model_are_found_once_each(tied: bool) -> None:
    plain = {name: tensor.clone() for name, tensor, _ in weights(make(tie_word_embeddings=tied))}
    found = {name: tensor for name, tensor, _ in weights(offloaded(make(tie_word_embeddings=tied)))}
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize("spec", SPECS[:3])
def test_a_model_whose_layers_device_map_has_put_apart_generates_what_it_does_in_one_place(spec: str, tmp_path: Path) -> None:
    """The layers are on the CPU and on disk, which every machine has."""
    whole, ids = make(), tokens(2, 150)
    whole.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = type(whole).from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload").eval()
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    caches = [tessera.Cache(spec, each) for each in (whole, model)]
    wanted, made = (each.generate(ids, past_key_values=c, **how) for each, c in zip((whole, model), caches, strict=True))
    assert torch.equal(made, wanted)
    assert caches[1].report() == caches[0].report()
    caches[1].save(tmp_path / "c")
    assert {x.device.type for x in tensors(tessera.Cache.load(tmp_path / "c", model))} == {"cpu"}


class Hook:
    """A hook like those that accelerate adds to modules."""

    def __init__(self, device: Any) -> None:
        self.execution_device = device


def test_every_layer_of_a_model_on_several_devices_has_its_own() -> None:
    model = make()
    model.model.layers[1].self_attn._hf_hook = Hook("meta")
    assert layer_devices(model, 2) == [torch.device("cpu"), torch.device("meta")]
    tessera.attach(model, TC)
    where = {index: {p.device.type for p in layer.parameters()} for index, layer in attached_memory(model).layers.items()}
    assert where == {0: {"cpu"}, 1: {"meta"}}


def test_a_layer_whose_weights_are_all_away_and_that_no_hook_tells_of_has_no_device() -> None:
    with torch.device("meta"):
        layer = nn.Linear(3, 3)
    assert device_of(layer) is None
    layer._hf_hook = Hook(None)  # type: ignore[assignment]
    assert device_of(layer) is None
    assert device_of(nn.Sequential(layer, nn.Linear(2, 2))) == torch.device("cpu")


@pytest.mark.parametrize("spec", ["dense", "sink:4 + window:50", "sink:4 + hqmq:3 + recent:16"])
def test_tiers_follow_the_keys_that_they_are_given(spec: str) -> None:
    """The test uses the device "meta", where nothing is computed but tensors have a device."""
    cache = tessera.Cache(spec, make().config)
    layer = cache.layers[0]
    k = torch.randn(2, 2, 100, 16)
    layer.update(k, k) if spec == "dense" else layer.context.__dict__.update(bounded=False)
    if spec != "dense":
        layer.update(k, k)
    layer.flush_staged()
    layer.update(k[:, :, :1].to("meta"), k[:, :, :1].to("meta"))
    layer.flush_staged()
    assert {x.device.type for tier in layer.buffers().values() for x in tier} == {"meta"}
    assert layer.device == torch.device("meta")


def test_a_cache_that_was_moved_away_comes_back_when_it_is_gone_on_with() -> None:
    model = make()
    cache = tessera.Cache("sink:4 + window:50", model)
    run(model, cache, tokens(1, 70), (None,))
    layer = cache.layers[0]
    layer.device = torch.device("meta")  # pretend that the model runs there
    layer.offload()
    assert {x.device.type for x in layer.buffers()["recent"]} == {"cpu"}
    layer.prefetch()
    assert {x.device.type for x in layer.buffers()["recent"]} == {"meta"}
