"""Pages in memory-mapped files give bit-identical results through all operations of a cache."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_models import logits, make, padding, tokens

import tessera
from tessera import codecs
from tessera.tiers import PAGE, QuantizedTier
from tessera.tiers.offload import InFiles, InMemory, mapped

SPECS = ["sink:4 + hqmq:4 + recent:16", "hqmq:4@1024 + q4_0 + recent:16", "sink:2 + hqmq:3/top:256 + recent:16"]
N = 2 * PAGE + 300


def stored(cache: tessera.Cache) -> list[bool]:
    tiers = [tier for layer in cache.layers for group in layer.groups for tier in group.chain.quantized]
    return [all(map(mapped, packed.tensors.values())) for tier in tiers for page in tier.pages for packed in page]


@torch.no_grad()
@pytest.mark.parametrize("spec", SPECS)
def test_results_are_the_same_to_the_bit(spec: str, tmp_path: Path) -> None:
    model, ids, mask = make(), tokens(2, N + 40), padding((0, 30), N + 40)
    plain, filed = tessera.Cache(spec, model), tessera.Cache(spec, model, offload=tmp_path)
    for cache in (plain, filed):
        logits(model, cache, ids[:, :N], (1500, N - 1500), mask[:, :N])
    assert any(stored(filed))
    assert not any(stored(plain))
    assert list(tmp_path.iterdir()) == []  # the files are deleted once mapped
    before, after = plain.report(), filed.report()
    assert (before.nbytes, before.tiers) == (after.nbytes, after.tiers)
    assert before.offloaded == 0
    assert 0.3 * after.nbytes < after.offloaded < after.nbytes
    assert "offloaded" in str(after)
    assert torch.equal(logits(model, filed, ids[:, N:], (20, 20), mask), logits(model, plain, ids[:, N:], (20, 20), mask))


@torch.no_grad()
def test_a_cache_with_files_lives_as_any_other(tmp_path: Path) -> None:
    model, ids = make(), tokens(2, N + 20)
    plain, filed = (tessera.Cache(SPECS[0], model, offload=where) for where in (None, tmp_path))
    for cache in (plain, filed):
        logits(model, cache, ids[:, :N], (N,))
    filed.save(tmp_path / "saved")
    loaded = tessera.Cache.load(tmp_path / "saved", model, offload=tmp_path)
    twin = copy.deepcopy(filed)
    assert any(stored(loaded))

    def go_on(change: Any) -> None:
        found = []
        for cache in (plain, filed, loaded, twin):
            own = copy.deepcopy(cache)
            change(own)
            rows = own.layers[0].batch
            found.append(logits(model, own, ids[:1, N:].expand(rows, -1), (20,)))
        assert all(torch.equal(one, found[0]) for one in found)

    go_on(lambda cache: None)
    go_on(lambda cache: cache.crop(-200))
    go_on(lambda cache: cache.crop(-(N - 500)))
    go_on(lambda cache: cache.reorder_cache(torch.tensor([1, 1])))
    go_on(lambda cache: cache.batch_repeat_interleave(2))
    go_on(lambda cache: [layer.offload() or layer.prefetch() for layer in cache.layers])
    filed.reorder_cache(torch.tensor([1, 0]))
    assert any(stored(filed))
    filed.reset()
    assert filed.report().nbytes == 0


def test_pages_that_have_gone_are_decoded_where_tokens_are(tmp_path: Path) -> None:
    k, v = torch.randn(2, 1, 2, PAGE + 128, 16).unbind(0)
    tier = QuantizedTier(codecs.get("q4_0"), 0, store=InFiles(tmp_path))
    plain = QuantizedTier(codecs.get("q4_0"), 0)
    for one in (tier, plain):
        one.append(k, v)
    assert all(map(torch.equal, tier.front(PAGE + 64), plain.front(PAGE + 64)))
    tier.drop_front(PAGE - 64)
    plain.drop_front(PAGE - 64)
    assert all(map(torch.equal, tier.front(192), plain.front(192)))
    assert not any(map(mapped, tier.buffers()))


def test_pages_elsewhere_are_a_source_of_their_own() -> None:
    """The test uses a device without data, in place of a GPU that keeps incomplete pages."""
    k = torch.randn(1, 2, PAGE + 128, 16)
    tier = QuantizedTier(codecs.get("q4_0"), 0, store=InMemory())
    tier.append(k, k)
    whole, rest = tier.pages
    tier.put([whole, (rest[0].to("meta"), rest[1].to("meta"))])
    first, second = tier.sources(7, None)
    assert (first.start, first.tokens, second.start, second.tokens) == (7, PAGE, 7 + PAGE, 128)
    assert first.held.pages[0][0].device.type == "cpu"
    tier.to("meta")
    assert [keys.device.type for keys, _ in tier.pages] == ["cpu", "meta"]


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for where in (tmp_path / "nowhere", ""):
        with pytest.raises(FileNotFoundError, match=r"there is no folder '.*' for the pages of a cache; make it first"):
            tessera.Cache(SPECS[0], make(), offload=where)


@torch.no_grad()
def test_a_disk_that_is_full_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make(), tokens(1, N)
    cache = tessera.Cache(SPECS[0], model, offload=tmp_path)
    logits(model, cache, ids[:, :1000], (1000,))

    def full(*_: Any) -> Any:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(InFiles, "keep", full)
        with pytest.raises(OSError, match="no space"):
            logits(model, cache, ids[:, 1000:1200], (200,))
    group = cache.layers[0].groups[0]
    assert group.length == 1200
    assert group.chain.dropped == 0
    assert sum(group.chain.held.values()) == 1200  # tokens that could not be stored are still exact
