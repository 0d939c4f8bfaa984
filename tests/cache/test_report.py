"""`cache.report()` agrees with the memory of the cache's tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cache_fixtures import GROUPED
from cache_models import logits, make, padding, tokens
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig

import tessera
from tessera.codecs import Codec

SPECS = [
    "dense",
    "window:50",
    "sink:4 + window:50",
    "sink:4 + hqmq:4 + recent:128",
    "hqmq:4@128",
    "sink:4 + hqmq:s96_r4_med3 + recent:30",
    "sink:4 + (k=q8_0,v=hqmq:3)@256 + recent:30",
    "kivi:4 + recent:16",
    f"sink:1 + {GROUPED}@256 + recent:3",
    "q4_0",
    "sink:2 + hqmq:4/top:64 + recent:30",
]
FAMILIES = ["llama", "mistral", "gemma3", "phi3", "gpt-neox"]
CUTS = (300, 1, 1, 60, 1)


def reachable(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    """Return every tensor that `thing` keeps alive, except those of codecs and models, which caches share."""
    if id(thing) in seen or isinstance(thing, Codec | nn.Module | PretrainedConfig | type):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
        return
    children: list[Any] = []
    if isinstance(thing, dict):
        children += thing.values()
    elif isinstance(thing, list | tuple | set):
        children += thing
    children += vars(thing).values() if hasattr(thing, "__dict__") else ()
    children += [getattr(thing, name) for name in getattr(type(thing), "__slots__", ()) if hasattr(thing, name)]
    for child in children:
        yield from reachable(child, seen)


def memory(thing: Any) -> int:
    """Return the bytes of the storages of all tensors that `thing` keeps alive, each counted once."""
    storages = {}
    for tensor in reachable(thing, set()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def filled(spec: str, model: Any, rows: int = 2, cuts: tuple[int, ...] = CUTS, **kwargs: Any) -> tessera.Cache:
    cache = tessera.Cache(spec, model, **kwargs)
    logits(model, cache, tokens(rows, sum(cuts)), cuts)
    return cache


def test_the_walk_finds_what_is_hidden() -> None:
    class Holder:
        def __init__(self) -> None:
            self.deep = {"a": [(torch.zeros(10)[:3], torch.zeros(5))]}

    assert memory(Holder()) == 60
    cache = filled("sink:4 + hqmq:4 + recent:16", make())
    before = memory(cache)
    cache.layers[1].groups[0].forgotten = torch.zeros(1000)  # type: ignore[attr-defined]
    assert memory(cache) == before + 4000


@pytest.mark.parametrize("prefill", ["exact", "quantized"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", SPECS)
def test_bytes_are_those_of_the_tensors(spec: str, family: str, prefill: Any) -> None:
    """The bytes include free space, and storage that a view keeps alive."""
    cache = filled(spec, make(family), prefill=prefill)
    report = cache.report()
    assert report.nbytes == sum(report.tiers.values()) == memory(cache)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("spec", ["hqmq:4 + recent:16", "sink:4 + hqmq:3", "sink:4 + hqmq:4@1024"])
def test_what_kernels_keep_of_pages_is_no_second_copy(spec: str, head_dim: int) -> None:
    """The test has sizes that compiled kernels support, several rows, and a page that is not full."""
    cache = filled(spec, make("llama", head_dim=head_dim), cuts=(1300, 1, 200, 1, 64, 1))
    assert cache.report().nbytes == memory(cache)


@pytest.mark.parametrize("spec", SPECS)
def test_bytes_are_right_after_every_change(spec: str) -> None:
    model = make()
    cache = tessera.Cache(spec, model)
    assert cache.report().nbytes == memory(cache) == 0
    ids, mask = tokens(3, 400), padding((0, 200, 0), 400)

    def check() -> None:
        assert cache.report().nbytes == memory(cache)

    logits(model, cache, ids[:, :350], (350,), mask[:, :350])
    check()
    cache.activate_past_recording()
    logits(model, cache, ids[:, 350:], (50,), mask)
    check()
    cache.crop(-40)
    check()
    cache.reorder_cache(torch.tensor([2, 1, 1]))
    check()
    cache.batch_repeat_interleave(2)
    check()
    cache.batch_select_indices(torch.tensor([0, 3]))
    check()
    if "@" not in spec and "window" not in spec:
        cache.crop(-300)
        check()
    check()
    copied = copy.deepcopy(cache)
    assert memory(copied) == memory(cache)
    cache.reset()
    assert cache.report().nbytes == memory(cache) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_bytes_are_those_of_transformers_cache(family: str, dtype: torch.dtype) -> None:
    model = make(family, dtype)
    theirs = DynamicCache(config=model.config)
    logits(model, theirs, tokens(2, sum(CUTS)), CUTS)
    held = sum(t.numel() * t.element_size() for layer in theirs.layers for t in (layer.keys, layer.values))
    for spec in ("dense", "sink:4 + hqmq:4 + recent:16", "window:20"):
        report = filled(spec, model).report()
        assert report.dense_nbytes == held
        assert report.compression == held / report.nbytes


@pytest.mark.parametrize("spec", SPECS)
def test_true_bits_count_everything_over_what_is_held(spec: str) -> None:
    cache = filled(spec, make())
    report = cache.report()
    vector = 2 * 2 * 2 * 16  # keys and values, layers, heads, head_dim
    held = cache.layers[0].held()
    assert report.elements == sum(held.values()) * vector
    assert (report.elements < 2 * sum(CUTS) * vector) == cache.spec.bounded
    assert report.bits_per_element == pytest.approx(8 * memory(cache) / report.elements)
    assert report.tokens == sum(CUTS)
    codec = cache.spec.codec
    if codec is not None:
        tiers = [tier for layer in cache.layers for group in layer.groups for tier in group.chain.quantized]
        known = sum(tier.stats.nbytes for tier in tiers if tier.stats is not None)
        assert (known > 0) == codec.startswith("hqmq:4")
        assert report.tiers[codec] == known + sum(packed.nbytes for tier in tiers for page in tier.pages for packed in page)
        assert report.tier_bits[codec] == pytest.approx(8 * report.tiers[codec] / (held["quantized"] * vector))
        assert report.tier_bits[codec] < 16


def test_tiers_have_the_names_of_the_spec() -> None:
    model = make()
    assert set(filled("dense", model).report().tiers) == {"dense"}
    assert set(filled("sink:4 + window:50", model).report().tiers) == {"sink", "window"}
    assert set(filled("sink:4 + hqmq:4 + recent:16", model).report().tiers) == {"sink", "hqmq:4", "recent"}
    assert set(filled("hqmq:4@128", model).report().tiers) == {"hqmq:4", "recent"}


def test_the_bits_of_keys_and_values_apart_are_their_mean() -> None:
    """At head_dim 16 scales cost 8/16 of a bit, those of int 16/16, key centres 16/64; statistics take a byte per channel."""
    model = make()
    for spec, keys, values in (("hqmq:k4v3", 4 + 8 / 16 + 16 / 64, 3 + 8 / 16), ("(k=int:4,v=hqmq:3)", 4 + 16 / 16, 3.5)):
        cache = filled(f"{spec} + recent:16", model)
        report = cache.report()
        if spec.startswith("hqmq"):
            held = cache.layers[0].held()["quantized"] / sum(len(group.rows) for group in cache.layers[0].groups)
            keys += 8 / held
        assert set(report.tiers) == {spec, "recent"}
        assert report.tier_bits[spec] == pytest.approx((keys + values) / 2)


def test_exact_tiers_cost_their_tokens_and_a_little_room() -> None:
    model = make()
    token = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, head_dim, bytes
    report = filled("sink:4 + window:50", model, rows=1).report()
    assert report.tiers["sink"] == 4 * token
    # The next query sees 49 tokens; up to 63 more wait until their block is full, and there is space for up to 127 more.
    assert 49 * token <= report.tiers["window"] <= (49 + 63 + 127) * token
    dense = filled("dense", model, rows=1).report()
    assert sum(CUTS) * token <= dense.tiers["dense"] < (sum(CUTS) + 64) * token


def test_a_window_stops_growing() -> None:
    model = make()
    sizes = {filled("sink:4 + window:50", model, cuts=(300,) * n).report().nbytes for n in (1, 2, 4)}
    assert max(sizes) - min(sizes) <= 64 * 2 * 2 * 2 * 2 * 16 * 4
    limited = [filled("sink:4 + hqmq:4@128 + recent:16", model, cuts=(300,) * n).report() for n in (1, 2, 4)]
    assert {report.tiers["hqmq:4"] for report in limited} == {limited[0].tiers["hqmq:4"]}


def test_tokens_on_their_way_are_counted_as_staged() -> None:
    model = make()
    cache = tessera.Cache("dense", model)
    k = torch.randn(1, 2, 10, 16)
    cache.update(k, k.clone(), 0)
    assert cache.report().tiers == {"staged": 2 * k.numel() * 4} == {"staged": memory(cache)}


def test_of_a_short_context_it_says_what_is_set_aside() -> None:
    cache = filled("sink:4 + hqmq:4 + recent:128", make(), cuts=(20,))
    report, layers = cache.report(), cache.layers
    assert report.compression < 1
    # Four sinks fill their buffer; the sixteen others are in a buffer of sixteen.
    learned = sum(x.numel() * 4 for layer in layers for x in layer.groups[0].chain.learning.buffers())
    assert report.set_aside == report.nbytes - report.dense_nbytes == learned > 0
    assert "smaller" not in str(report)
    assert f"{learned / 1024:.1f} KiB set aside for tokens to come" in str(report)
    assert "smaller" in str(filled("sink:4 + hqmq:4 + recent:128", make(), cuts=(400,)).report())


def test_buffers_grow_in_steps_of_an_eighth_or_sixteen_tokens() -> None:
    model = make()
    for count in (5, 21, 40, 130, 300, 800):
        report = filled("dense", model, cuts=(1,) * count if count < 50 else (count // 2, count - count // 2)).report()
        assert report.set_aside == report.nbytes - report.dense_nbytes
        assert report.nbytes <= report.dense_nbytes * max(1 + 1 / 8, -(-count // 16) * 16 / count)


def test_it_reads_well() -> None:
    report = filled("sink:4 + hqmq:4 + recent:16", make()).report()
    first, *rest = str(report).splitlines()
    assert first.startswith("sink:4 + hqmq:4 + recent:16: 363 tokens in ")
    assert f"{report.bits_per_element:.3f} bits per element" in first
    assert f"{report.compression:.2f}x smaller" in first
    assert [line.split()[0] for line in rest] == ["sink", "hqmq:4", "recent"]
