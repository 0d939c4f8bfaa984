"""Several codecs in one cache: tokens pass from each to the next as they age."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cache_models import make, padding, relative, tokens
from torch import Tensor

import tessera
from tessera.codecs import get
from tessera.tiers.chain import Chain
from tessera.tiers.policy import RetentionPolicy

SPEC = "sink:4 + hqmq:4@128 + hqmq:3@128 + q4_0 + recent:16"


@torch.no_grad()
def fed(model, ids: Tensor, cuts: tuple[int, ...], spec: str = SPEC, mask: Tensor | None = None, **options) -> tessera.Cache:
    cache, at = tessera.Cache(spec, model, **options), 0
    for size in cuts:
        model(ids[:, at : at + size], attention_mask=None if mask is None else mask[:, : at + size], past_key_values=cache)
        at += size
    return cache


def test_a_token_is_in_one_tier_by_its_age() -> None:
    model, ids = make(), tokens(2, 700)
    for length, held in (
        (127, (0, 0, 0)),
        (212, (192 - 64, 64, 0)),
        (400, (128, 128, 64)),
        (700, (128, 128, 384)),
    ):
        for cuts in ((length,), (length - 1, 1), (50,) * (length // 50) + (length % 50 or 1,)[: int(length % 50 > 0)]):
            group = fed(model, ids, cuts).layers[0].groups[0]
            first, second, third = (group.chain.held[name] for name in ("quantized", "quantized.1", "quantized.2"))
            assert (first, second, third) == held
            assert 4 + first + second + third + group.chain.recent.tokens == length


def test_what_is_kept_does_not_depend_on_the_cut() -> None:
    """The first layer's keys are the same however calls are cut, and so must be the contents of its tiers."""
    model, ids = make(num_hidden_layers=1), tokens(1, 600)
    wanted = fed(model, ids, (600,)).layers[0].dense()
    for cuts in ((300, 300), (64,) * 9 + (24,), (599, 1)):
        found = fed(model, ids, cuts).layers[0].dense()
        assert all(relative(a, b) < 1e-3 for a, b in zip(found, wanted, strict=True))


def test_older_tokens_are_as_the_codecs_give_them_back_one_after_the_other() -> None:
    policy = RetentionPolicy(sink=0, recent=0, codecs=((get("int:4"), 64), (get("q4_0"), None)), window=None)
    chain = Chain(policy, layer=0, rows=2)
    k, v = torch.randn(2, 1, 2, 192, 32).unbind(0)
    for begin in range(0, 192, 64):
        chain.append(k[:, :, begin : begin + 64], v[:, :, begin : begin + 64], begin)
        chain.evict_blocks(begin + 64)
    assert [(source.start, source.tokens) for source in chain.sources()] == [(0, 128), (128, 64)]
    for x, role, found in zip((k, v), ("key", "value"), chain.sources()[0].held.decode(), strict=True):
        wanted = x[:, :, :128]
        for codec in (get("int:4"), get("q4_0")):
            wanted = codec.decode(codec.encode(wanted, role))
        assert torch.equal(found, wanted)


def test_bytes_are_reported_codec_by_codec() -> None:
    model = make()
    cache = fed(model, tokens(1, 700), (700,))
    report = cache.report()
    assert list(report.tiers) == ["sink", "hqmq:4", "hqmq:3", "q4_0", "recent"]
    assert report.tier_bits["hqmq:4"] > report.tier_bits["hqmq:3"] + 0.9
    assert report.tier_bits["q4_0"] == 4.5 * 32 / 16  # blocks of 32 numbers, of which a head here has 16
    dense = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, head_dim, bytes
    assert report.dense_nbytes == 700 * dense


def test_the_last_limit_bounds_a_cache() -> None:
    model = make()
    cache = fed(model, tokens(1, 900), (450, 450), "hqmq:4@64 + hqmq:3@128 + recent:16")
    assert cache.spec.bounded
    group = cache.layers[0].groups[0]
    assert (group.chain.held["quantized"], group.chain.held["quantized.1"]) == (64, 128)
    assert group.chain.dropped == 900 - 64 - 128 - group.chain.recent.tokens


@pytest.mark.parametrize("length", [100, 400])
def test_a_saved_chain_goes_on_as_it_would_have(length: int, tmp_path: Path) -> None:
    model, ids = make(), tokens(2, 620)
    mask = padding((0, 9), 620)
    cache = fed(model, ids, (length,), mask=mask)
    cache.save(tmp_path / "c")
    loaded = tessera.Cache.load(tmp_path / "c", model)
    found, wanted = loaded.report(), cache.report()
    assert [found.tiers.get(codec) for codec, _ in cache.spec.codecs] == [
        wanted.tiers.get(codec) for codec, _ in cache.spec.codecs
    ]
    assert loaded.layers[0].held() == cache.layers[0].held()
    with torch.no_grad():
        found, wanted = (model(ids[:, length:], attention_mask=mask, past_key_values=one).logits for one in (loaded, cache))
    assert torch.equal(found, wanted)


def test_a_file_of_other_tiers_is_refused(tmp_path: Path) -> None:
    model = make()
    fed(model, tokens(1, 500), (500,)).save(tmp_path / "c")
    said = b"hqmq:4@128 + hqmq:3@128 + q4_0"
    damaged = (tmp_path / "c").read_bytes().replace(said, b"hqmq:4@128 + q4_0".ljust(len(said)), 1)
    (tmp_path / "c").write_bytes(damaged)
    with pytest.raises(ValueError, match="3 tiers of packed tokens, not 2"):
        tessera.Cache.load(tmp_path / "c", model)


def test_rows_take_their_tiers_along() -> None:
    model, ids = make(), tokens(3, 500)
    cache = fed(model, ids, (500,))
    before = [layer.dense() for layer in cache.layers]
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    for layer, (k, v) in zip(cache.layers, before, strict=True):
        found = layer.dense()
        assert torch.equal(found[0], k[[2, 2, 0]])
        assert torch.equal(found[1], v[[2, 2, 0]])


def test_a_crop_reaches_into_older_tiers() -> None:
    model, ids = make(), tokens(1, 500)
    cache = fed(model, ids, (500,))
    before = cache.layers[0].dense()
    cache.crop(-350)
    group = cache.layers[0].groups[0]
    assert (group.chain.held["quantized"], group.chain.held["quantized.1"]) == (0, 0)
    assert sum(group.chain.held.values()) == 150
    for found, wanted in zip(cache.layers[0].dense(), before, strict=True):
        assert torch.equal(found[:, :, :128], wanted[:, :, :128])


@torch.no_grad()
def test_generation_goes_on_through_all_tiers() -> None:
    model, ids = make(), tokens(2, 300)
    cache = tessera.Cache("sink:4 + hqmq:5@64 + hqmq:4@64 + hqmq:3 + recent:16", model)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=150, do_sample=False)
    assert out.shape[1] == 450
    group = cache.layers[0].groups[0]
    assert [group.chain.held[name] > 0 for name in ("quantized", "quantized.1", "quantized.2")] == [True] * 3
