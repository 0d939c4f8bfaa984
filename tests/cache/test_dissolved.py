"""A Tensor Cache after quantised tiers is written the tokens that leave the last of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cache_models import make, padding, tokens
from torch import Tensor

import tessera
from tessera.adapters import attached_memory
from tessera.attention.observed import Call, observed
from tessera.codecs import get
from tessera.tensor_cache import TensorCacheConfig

#: Slow decay, so that every written pair remains visible in the matrix.
OPTIONS: dict[str, Any] = {"window": 24, "sink": 3, "chunk": 16, "decay": (100, 1000)}
SPEC = "sink:3 + hqmq:4_nostats@128 + recent:16 + tc"


def attached(config: TensorCacheConfig | None = None, **changes: Any) -> Any:
    """Make a model with a memory whose output projection is nonzero."""
    model = tessera.attach(make(**changes), config or TensorCacheConfig(**OPTIONS))
    torch.manual_seed(7)
    with torch.no_grad():
        for layer in attached_memory(model).layers.values():
            layer.out.weight.normal_(0, 0.2)
            layer.gate_logit.fill_(1.0)
    return model


@torch.no_grad()
def fed(model: Any, ids: Tensor, cuts: tuple[int, ...], spec: str = SPEC, mask: Tensor | None = None) -> tessera.Cache:
    cache, at = tessera.Cache(spec, model), 0
    for size in cuts:
        model(ids[:, at : at + size], attention_mask=None if mask is None else mask[:, : at + size], past_key_values=cache)
        at += size
    return cache


def matrix(cache: tessera.Cache) -> Tensor:
    return cache.layers[0].groups[0].chain.tensor_cache.state.a


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("rule", ["delta", "outer"])
def test_the_matrix_has_what_the_codec_gave_back_and_nothing_else(rule: Any, rotary: bool) -> None:
    config = TensorCacheConfig(**OPTIONS, rule=rule, rotary=rotary)
    model, ids = attached(config, num_hidden_layers=1), tokens(2, 450)
    seen: list[Call] = []
    tessera.enable(model)
    with observed(seen.append), torch.no_grad():
        model(ids, use_cache=False)
    k, v = seen[0].key, seen[0].value
    cache = fed(model, ids, (300, 150))
    group = cache.layers[0].groups[0]
    assert group.chain.dropped == (450 - 3 - 16) // 64 * 64 - 128
    memory, codec = attached_memory(model).layers[0], get("hqmq:4_nostats")
    gone = slice(3, 3 + group.chain.dropped)
    k, v = (codec.decode(codec.encode(x[:, :, gone], role)) for x, role in ((k, "key"), (v, "value")))
    if not rotary:
        from transformers.models.llama.modeling_llama import rotate_half

        cos, sin = model.model.rotary_emb(k, torch.arange(450)[None, gone].expand(2, -1))
        k = k * cos[:, None] - rotate_half(k) * sin[:, None]
    state = memory.memory.initial_state(2, k)
    none, live = torch.zeros(2, 4, group.chain.dropped, 16), torch.ones(2, group.chain.dropped, dtype=torch.bool)
    with torch.no_grad():
        _, wanted = memory.memory.advance(none, k, v, live, state, by_loop=True)
    torch.testing.assert_close(matrix(cache), wanted.a, rtol=1e-3, atol=1e-4)


def test_it_does_not_depend_on_the_cut() -> None:
    model, ids = attached(num_hidden_layers=1), tokens(1, 500)
    wanted = matrix(fed(model, ids, (500,)))
    for cuts in ((1,) * 500, (250, 250), (499, 1), (64,) * 7 + (52,)):
        torch.testing.assert_close(matrix(fed(model, ids, cuts)), wanted, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_what_was_dissolved_is_read_by_later_queries_only() -> None:
    model, ids = attached(num_hidden_layers=1), tokens(1, 420)
    plain = "sink:3 + hqmq:4_nostats@128 + recent:16"
    for length, differs in ((200, False), (400, True)):
        with_tc, without = (fed(model, ids, (length,), spec) for spec in (SPEC, plain))
        first, second = (model(ids[:, length : length + 1], past_key_values=cache).logits for cache in (with_tc, without))
        assert torch.equal(first, second) != differs


def test_it_goes_along_with_its_rows_and_into_a_file(tmp_path: Path) -> None:
    model, ids = attached(TensorCacheConfig(**OPTIONS)), tokens(2, 560)
    mask = padding((0, 11), 560)
    cache = fed(model, ids, (400,), mask=mask)
    cache.save(tmp_path / "c")
    loaded = tessera.Cache.load(tmp_path / "c", model)
    with torch.no_grad():
        found, wanted = (model(ids[:, 400:], attention_mask=mask, past_key_values=one).logits for one in (loaded, cache))
    torch.testing.assert_close(found, wanted)
    before = [group.chain.tensor_cache.state.a for group in cache.layers[1].groups]
    cache.reorder_cache(torch.tensor([1, 0]))
    assert {group.rows[0]: group.chain.tensor_cache.state.a for group in cache.layers[1].groups}.keys() == {0, 1}
    assert all(any(torch.equal(group.chain.tensor_cache.state.a, a) for a in before) for group in cache.layers[1].groups)
    held = [t for layer in cache.layers for group in layer.groups for t in group.chain.tensor_cache.buffers()]
    assert cache.report().tiers["tc"] == sum(t.nbytes for t in held)


def test_several_codecs_and_a_memory_are_one_hierarchy() -> None:
    model, ids = attached(), tokens(1, 700)
    cache = fed(model, ids, (350, 350), "sink:3 + hqmq:4@128 + hqmq:3@128 + recent:16 + tc")
    group = cache.layers[0].groups[0]
    held = group.chain.held
    assert (held["quantized"], held["quantized.1"]) == (128, 128)
    assert group.chain.dropped == 700 - sum(held.values())
    assert set(cache.report().tiers) == {"sink", "hqmq:4", "hqmq:3", "recent", "tc"}
    with torch.no_grad():
        out = model.generate(ids[:, :300], past_key_values=tessera.Cache(str(cache.spec), model), max_new_tokens=80)
    assert out.shape[1] == 380


def test_a_crop_takes_nothing_back_from_the_matrix() -> None:
    model, ids = attached(num_hidden_layers=1), tokens(1, 500)
    cache = fed(model, ids, (450,))
    before = matrix(cache).clone()
    cache.crop(-100)
    assert torch.equal(matrix(cache), before)
    with torch.no_grad():
        model(ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="has dropped its tokens up to"):
        cache.crop(-330)


def test_what_cannot_be_is_refused() -> None:
    model = attached()
    for spec, match in (
        ("sink:3 + hqmq:4 + tc", "'tc' absorbs what leaves a window, or a codec"),
        ("sink:4 + hqmq:4@128 + tc", "was made for 'sink:3"),
    ):
        with pytest.raises(ValueError, match=match):
            tessera.Cache(spec, model)
    ids = tokens(1, 400)
    cache = fed(model, ids, (390,))
    mask = torch.ones(1, 1, 10, 400, dtype=torch.bool).tril(390)
    mask[..., 300] = False
    with pytest.raises(ValueError, match="behind a codec it can hide padding only"), torch.no_grad():
        model(ids[:, 390:], attention_mask=mask, past_key_values=cache)


@torch.no_grad()
def test_a_mask_is_refused_whichever_layer_asked_first() -> None:
    model, ids = attached(), tokens(1, 400)
    one, other = (f"sink:3 + hqmq:4_nostats@{limit} + recent:16 + tc" for limit in (128, 1024))
    mask = torch.ones(1, 1, 10, 400, dtype=torch.bool).tril(390)
    mask[..., 20] = False
    for spec in (f"{{0: {one}; *: {other}}}", f"{{0: {other}; *: {one}}}"):
        cache = fed(model, ids, (390,), spec)
        with pytest.raises(ValueError, match="behind a codec it can hide padding only"):
            model(ids[:, 390:], attention_mask=mask, past_key_values=cache)


def test_a_layer_with_a_window_of_its_own_keeps_all_of_it() -> None:
    model = tessera.attach(make("qwen2-sliding", sliding_window=400), TensorCacheConfig(**OPTIONS))
    cache = fed(model, tokens(1, 700), (350, 350))
    for layer in cache.layers:
        held = sum(layer.groups[0].chain.held.values())
        assert held >= 399 if layer.is_sliding else held < 300
