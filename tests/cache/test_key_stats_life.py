"""Key statistics of a cache: when they are fixed, what they do not depend on, and how they are saved and copied."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from cache_models import make, padding, relative, tokens
from torch import Tensor

import tessera
from tessera.codecs import KeyStats, get, save_stats
from tessera.tiers import QuantizedTier
from tessera.tiers.learning import LEARN

SPEC = "sink:4 + hqmq:4 + recent:16"


def sizes(cache: tessera.Cache) -> list[list[Tensor]]:
    """Return the statistics of each layer and group, as bytes."""
    return [[group.chain.stats.sizes for group in layer.groups if group.chain.stats is not None] for layer in cache.layers]


@torch.no_grad()
def fed(model, ids: Tensor, cuts: tuple[int, ...], spec: str = SPEC, mask: Tensor | None = None, **options) -> tessera.Cache:
    cache = tessera.Cache(spec, model, **options)
    at = 0
    for size in cuts:
        model(ids[:, at : at + size], attention_mask=None if mask is None else mask[:, : at + size], past_key_values=cache)
        at += size
    return cache


def test_nothing_is_packed_before_they_are_known() -> None:
    model = make()
    for length, packed in ((LEARN - 1, 0), (LEARN, 64), (LEARN + 80, 128)):
        cache = fed(model, tokens(1, length), (length,))
        assert {group.chain.held["quantized"] for layer in cache.layers for group in layer.groups} == {packed}
        assert bool(sizes(cache)[0]) == (length >= LEARN)


@pytest.mark.parametrize("prefill", ["exact", "quantized"])
def test_they_do_not_depend_on_the_cut(prefill: str) -> None:
    """The first layer's queries and keys are the same however the calls are cut, so its statistics must be equal."""
    model, ids = make(num_hidden_layers=1), tokens(2, 200)
    wanted = sizes(fed(model, ids, (200,), prefill=prefill))
    for cuts in ((1,) * 200, (127, 1, 72), (128, 72), (60, 60, 60, 20)):
        found = sizes(fed(model, ids, cuts, prefill=prefill))
        assert torch.equal(found[0][0], wanted[0][0])


def test_they_do_not_depend_on_other_rows_or_on_padding() -> None:
    model, ids = make(num_hidden_layers=1), tokens(2, 200)
    mask = padding((0, 13), 200)
    cache = fed(model, ids, (150, 50), mask=mask)
    rows = {row: one for group, one in zip(cache.layers[0].groups, sizes(cache)[0], strict=True) for row in group.rows}
    assert len(rows) == 2
    assert torch.equal(rows[0], sizes(fed(model, ids[:1], (200,)))[0][0])
    # Positions of the padded row count from its first slot; a rotary embedding does not change mean squares.
    alone = sizes(fed(model, ids[1:, 13:], (187,)))[0][0]
    assert ((rows[1] >> 3).int() - (alone >> 3).int()).abs().max() <= 1


def test_later_tokens_change_nothing() -> None:
    model, ids = make(num_hidden_layers=1), tokens(1, 400)
    early, late = (sizes(fed(model, ids, cuts)) for cuts in ((150,), (150, 250)))
    assert torch.equal(early[0][0], late[0][0])


def test_tokens_that_may_be_cropped_do_not_count() -> None:
    """Tokens that are cropped while the past is recorded do not influence the statistics."""
    model, ids = make(num_hidden_layers=1), tokens(1, 200)
    other = ids.clone()
    other[:, 100:] = (other[:, 100:] + 5) % 90 + 3
    cache = tessera.Cache(SPEC, model)
    with torch.no_grad():
        model(ids[:, :100], past_key_values=cache)
        cache.activate_past_recording()
        model(other[:, 100:180], past_key_values=cache)
        assert not sizes(cache)[0]
        cache.crop(-80)
        model(ids[:, 100:], past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)  # not cropped, so the pending tokens are packed
    wanted = fed(model, ids, (200,))
    assert torch.equal(sizes(cache)[0][0], sizes(wanted)[0][0])


def test_they_follow_their_rows() -> None:
    model, ids = make(), tokens(3, 180)
    cache = fed(model, ids, (180,))
    before = sizes(cache)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    for one, other in zip(before, sizes(cache), strict=True):
        assert torch.equal(one[0][[2, 0, 0]], other[0])
    cache.reset()
    assert sizes(cache) == [[], []]


@pytest.mark.parametrize("length", [90, 200])
def test_a_saved_cache_goes_on_as_the_one_that_was_saved(length: int, tmp_path: Path) -> None:
    """This includes a cache whose statistics are not yet fixed."""
    model, ids = make(), tokens(2, 320)
    cache = fed(model, ids, (length,), mask=padding((0, 7), length))
    cache.save(tmp_path / "c")
    loaded = tessera.Cache.load(tmp_path / "c", model)
    with torch.no_grad():
        rest = {"attention_mask": padding((0, 7), 320)}
        found, wanted = (model(ids[:, length:], past_key_values=one, **rest).logits for one in (loaded, cache))
    assert torch.equal(found, wanted)
    assert cache.report().nbytes == loaded.report().nbytes
    assert all(torch.equal(a, b) for x, y in zip(sizes(cache), sizes(loaded), strict=True) for a, b in zip(x, y, strict=True))


def given_stats(model) -> list[KeyStats]:
    return [KeyStats.measure(torch.rand(1, 2, 64, 16), torch.randn(1, 2, 64, 16)) for _ in range(2)]


def test_those_that_are_given_serve_from_the_first_token(tmp_path: Path) -> None:
    model, ids = make(), tokens(2, 100)
    stats = given_stats(model)
    save_stats(stats, tmp_path / "s")
    cache = fed(model, ids, (100,), stats=tmp_path / "s")
    assert {group.chain.held["quantized"] for layer in cache.layers for group in layer.groups} == {64}
    for found, wanted in zip(sizes(cache), stats, strict=True):
        assert torch.equal(found[0], wanted.sizes.expand(2, -1, -1))
    # The cache's file stores the statistics, also for rows that begin later.
    cache.save(tmp_path / "c")
    loaded = tessera.Cache.load(tmp_path / "c", model)
    loaded.reset()
    with torch.no_grad():
        model(ids, past_key_values=loaded)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(sizes(cache), sizes(loaded), strict=True))


def test_those_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = make()
    stats = given_stats(model)
    for spec, given, match in (
        (SPEC, stats[:1], "of a model of 1 layers; yours has 2"),
        (SPEC, [KeyStats(stats[0].sizes[:, :1]), None], r"layer 0: statistics \(1, 1, 16\)"),
        (SPEC, [KeyStats(stats[0].sizes.expand(2, -1, -1)), None], "statistics of 2 rows"),
        ("kivi:4", stats, "'kivi:4' has no use for them"),
        ("dense", stats, "this spec has no codec"),
    ):
        with pytest.raises(ValueError, match=match):
            tessera.Cache(spec, model, stats=given)
    with pytest.raises(FileNotFoundError):
        tessera.Cache(SPEC, model, stats=tmp_path / "absent")


def test_without_queries_keys_are_packed_as_they_are() -> None:
    """Only Tessera's attention function provides queries."""
    model, ids = make(), tokens(1, 150)
    cache = tessera.Cache("hqmq:4 + recent:16", model.config)
    with pytest.warns(UserWarning, match="not 'tessera'"), torch.no_grad():
        model(ids, past_key_values=cache)
    assert sizes(cache) == [[], []]
    assert {group.chain.held["quantized"] for layer in cache.layers for group in layer.groups} == {128}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_what_it_is(dtype: torch.dtype) -> None:
    model, ids = make(dtype=dtype), tokens(1, 220)
    cache = fed(model, ids, (220,))
    assert {k.dtype for layer in cache.layers for k in (layer.keys, layer.values)} == {dtype}
    cache.crop(-50)
    assert {t.dtype for layer in cache.layers for group in layer.groups for t in group.chain.recent.buffers()} == {dtype}


@torch.no_grad()
def test_a_model_with_rescaled_keys_is_compressed_as_well() -> None:
    """Key channels are rescaled 1:30 and queries inversely; the error must be equal within a tenth."""
    model, twin, ids = make(num_hidden_layers=1), make(num_hidden_layers=1), tokens(2, 300)
    generator = torch.Generator().manual_seed(3)
    attention, other = (one.model.layers[0].self_attn for one in (model, twin))
    for one in (attention, other):  # channels of different importance, so that the statistics have an effect
        one.q_proj.weight.copy_(one.q_proj.weight * 4)
    half = (1.2 * torch.randn(2, 8, generator=generator)).clamp(-1.7, 1.7).exp()
    factor = torch.cat((half, half), 1)
    other.k_proj.weight.copy_(attention.k_proj.weight * factor.flatten()[:, None])
    other.q_proj.weight.copy_(attention.q_proj.weight / factor.repeat_interleave(2, 0).flatten()[:, None])
    exact = model(ids).logits
    assert relative(twin(ids).logits, exact) < 1e-4
    errors = []
    for one in (model, twin):
        for spec in ("hqmq:3", "hqmq:3_nostats"):
            cache = tessera.Cache(spec, one, prefill="quantized")
            errors.append(relative(one(ids, past_key_values=cache).logits, exact))
    seen, plain, seen_twin, plain_twin = errors
    assert seen_twin == pytest.approx(seen, rel=0.1)
    assert plain_twin > 1.3 * plain


def test_a_pickled_cache_reads_its_own_bytes() -> None:
    """This includes a cache after a step, when kernels have stored addresses of the bytes."""
    model, ids = make(), tokens(1, 302)
    cache = fed(model, ids, (300, 1))
    other = pickle.loads(pickle.dumps(cache))
    for layer in cache.layers:
        for page in layer.groups[0].chain.quantized[0].pages:
            for packed in page:
                packed.tensors["codes"].zero_()
    with torch.no_grad():
        found = model(ids[:, 301:], past_key_values=other).logits
        wanted = model(ids[:, 301:], past_key_values=fed(model, ids, (300, 1))).logits
    assert torch.equal(found, wanted)


def test_layers_without_use_for_statistics_have_none(tmp_path: Path) -> None:
    model, ids = make(), tokens(1, 200)
    cache = fed(model, ids, (200,), "{0: dense; *: sink:4 + hqmq:4 + recent:16}", stats=given_stats(model))
    cache.save(tmp_path / "c")
    assert tessera.Cache.load(tmp_path / "c", model).report().tiers.keys() == {"sink", "hqmq:4", "recent", "dense"}
    booked = fed(model, ids, (200,), "q8_0@64 + hqmq:4 + recent:16").report().tier_bits
    assert booked["q8_0"] == 8.5 * 2  # blocks of 32 numbers, of which a head here has 16


def test_layers_may_share_statistics(tmp_path: Path) -> None:
    model = make()
    one = given_stats(model)[0]
    save_stats([one, one], tmp_path / "s")
    cache = fed(model, tokens(1, 100), (100,), stats=[one, one])
    cache.save(tmp_path / "c")
    assert len(tessera.Cache.load(tmp_path / "c", model).layers) == 2


def test_text_that_was_forgotten_before_a_key_was_packed_tells_nothing() -> None:
    model, ids, other = make(num_hidden_layers=1), tokens(1, 400), tokens(1, 150) // 2 + 3
    spec = "sink:4 + hqmq:4 + recent:200"
    cache = fed(model, torch.cat((ids[:, :20], other), 1), (170,), spec)
    cache.crop(20)
    with torch.no_grad():
        model(ids[:, 20:], past_key_values=cache)
    assert torch.equal(sizes(cache)[0][0], sizes(fed(model, ids, (400,), spec))[0][0])


def test_widened_keys_stay_half_precision_numbers() -> None:
    """The test has a nearly constant channel far from zero."""
    k = torch.randn(1, 1, 192, 16)
    k[..., 3] = 3000 + 0.01 * torch.randn(192)
    stats = KeyStats.measure(torch.ones(1, 1, 128, 16), k[:, :, :128])
    for dtype in (torch.float32, torch.float16):
        tier = QuantizedTier(get("hqmq:4"), 0)
        tier.stats = stats
        tier.append(k.to(dtype), k.to(dtype))
        found, _ = tier.view.decode()
        assert (found[..., 3].float() - 3000).abs().max() < 8


def test_a_query_that_is_not_finite_tells_nothing() -> None:
    q, k = torch.rand(1, 1, 128, 16), torch.randn(1, 1, 128, 16)
    wrong = q.clone()
    wrong[:, :, 5] = torch.nan
    wrong[:, :, 6, 2] = torch.inf
    first, second = (KeyStats.measure(x, k).sizes.int() for x in (q, wrong))
    assert ((first >> 3) - (second >> 3)).abs().max() <= 1
