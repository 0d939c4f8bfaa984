from __future__ import annotations

import pytest
import torch
from cache_fixtures import CODECS
from torch import Tensor

from tessera import codecs
from tessera.cache import BLOCK, parse
from tessera.cache_layers.group import RECORDED, SequenceGroup
from tessera.kernels import CompressedKV
from tessera.kernels.compressed_kv import Coded
from tessera.tiers import PAGE, ExactTier, QuantizedTier
from tessera.tiers.policy import RetentionPolicy


def pair(tokens: int, rows: int = 2, start: int = 0) -> tuple[Tensor, Tensor]:
    """Return keys that encode their position, and their negatives as values."""
    place = torch.arange(start, start + tokens, dtype=torch.float32)
    k = place[None, None, :, None] + torch.zeros(rows, 2, tokens, 8)
    return k, -k


def pop_front(tier: ExactTier, n: int) -> tuple[Tensor, Tensor]:
    front = tier.front(n)
    tier.drop_front(n)
    return front


def places(tier: ExactTier) -> list[int]:
    return tier.keys[0, 0, :, 0].long().tolist() if tier.tokens else []


def test_exact_tier() -> None:
    tier = ExactTier()
    tier.append(*pair(10))
    tier.append(*pair(100, start=10))
    assert places(tier) == list(range(110))
    k, v = pop_front(tier, 64)
    assert k.shape == (2, 2, 64, 8)
    assert torch.equal(v, -k)
    assert places(tier) == list(range(64, 110))
    tier.crop_back(6)
    tier.append(*pair(2, start=104))
    assert places(tier) == list(range(64, 106))
    tier.push_front(*pair(3, start=61))
    assert places(tier) == list(range(61, 106))
    assert torch.equal(tier.values, -tier.keys)
    tier.select(torch.tensor([1, 1, 0]))
    assert tier.keys.shape == (3, 2, 45, 8)


def test_exact_tier_writes_a_step_in_place() -> None:
    tier = ExactTier()
    tier.append(*pair(64))
    tier.append(*pair(1, start=64))
    buffer = tier.buffers()[0].data_ptr()
    for place in range(65, 80):
        tier.append(*pair(1, start=place))
    assert tier.buffers()[0].data_ptr() == buffer
    assert places(tier) == list(range(80))


def test_exact_tier_leaves_inference_mode() -> None:
    tier = ExactTier()
    with torch.inference_mode():
        tier.append(*pair(3))
    tier.append(*pair(1, start=3))
    with torch.inference_mode():
        tier.append(*pair(1, start=4))
    tier.append(*pair(1, start=5))
    assert places(tier) == list(range(6))


def test_nothing_that_was_popped_stays_in_memory() -> None:
    tier = ExactTier()
    tier.append(*pair(5000))
    pop_front(tier, 4900)
    assert sum(t.untyped_storage().nbytes() for t in tier.buffers()) <= 2 * 2 * 2 * (100 + 2 * BLOCK) * 8 * 4
    tier.append(*pair(5000))
    tier.crop_back(5000)
    assert sum(t.untyped_storage().nbytes() for t in tier.buffers()) <= 2 * 2 * 2 * (100 + 2 * BLOCK) * 8 * 4


@pytest.mark.parametrize("spec", CODECS)
def test_codec_tier(spec: str) -> None:
    codec = codecs.get(spec)
    k, v = torch.randn(2, 2, 40 * BLOCK, 16), torch.randn(2, 2, 40 * BLOCK, 16)
    whole = codec.encode(k, "key", 3).decode(), codec.encode(v, "value", 3).decode()
    tier = QuantizedTier(codec, 3)
    cuts = torch.tensor([1, 1, 3, 20, 1, 14]) * BLOCK
    for part_k, part_v in zip(k.split(cuts.tolist(), 2), v.split(cuts.tolist(), 2), strict=True):
        tier.append(part_k, part_v)

    def decoded() -> tuple[Tensor, Tensor]:
        return torch.cat([p.decode() for p, _ in tier.pages], 2), torch.cat([p.decode() for _, p in tier.pages], 2)

    assert [page.tokens for page, _ in tier.pages] == [PAGE, PAGE, 8 * BLOCK]
    torch.testing.assert_close(decoded(), whole, atol=0, rtol=0)
    tier.drop_front(18 * BLOCK)
    torch.testing.assert_close(decoded(), tuple(x[:, :, 18 * BLOCK :] for x in whole), atol=0, rtol=0)
    rest = tier.crop_back(BLOCK + 10)
    assert rest is not None
    # Rotating fewer tokens back may round differently.
    torch.testing.assert_close(rest, tuple(x[:, :, 38 * BLOCK : 39 * BLOCK - 10] for x in whole), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(decoded(), tuple(x[:, :, 18 * BLOCK : 38 * BLOCK] for x in whole), atol=0, rtol=0)
    assert tier.crop_back(4 * BLOCK) is None
    assert tier.tokens == 16 * BLOCK
    for tensor in tier.buffers():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    tier.select(torch.tensor([1, 0, 1]))
    torch.testing.assert_close(decoded()[0], whole[0][[1, 0, 1], :, 18 * BLOCK : 34 * BLOCK], atol=0, rtol=0)
    tier.crop_back(16 * BLOCK)
    assert tier.tokens == 0
    assert tier.pages == []


def test_appending_leaves_what_is_there_where_it_is() -> None:
    tier = QuantizedTier(codecs.get("hqmq:4"), 0)
    k, v = torch.randn(2, 1, 2, 40 * BLOCK, 64).unbind(0)
    joins = 0
    for block in range(40):
        before = tier.pages
        tier.append(*(x[:, :, block * BLOCK : (block + 1) * BLOCK] for x in (k, v)))
        if len(tier.pages) > len(before):
            assert all(old is new for old, new in zip(before, tier.pages, strict=False))
        else:
            joins += 1  # once per page
            assert tier.pages[-1][0].tokens == PAGE
    assert joins == 40 * BLOCK // PAGE
    assert [page.tokens for page, _ in tier.pages] == [PAGE, PAGE] + 8 * [BLOCK]
    assert sum(t.untyped_storage().nbytes() for t in tier.buffers()) == sum(t.nbytes for t in tier.buffers())
    torch.testing.assert_close(tier.view.decode()[0], tier.codec.encode(k, "key").decode(), atol=0, rtol=0)


def test_what_kernels_noted_of_pages_is_kept_as_long_as_these() -> None:
    tier = QuantizedTier(codecs.get("hqmq:4"), 0)
    k, v = torch.randn(2, 1, 2, 20 * BLOCK, 64).unbind(0)
    noted: list[int] = []

    def note(keys: Coded, _values: Coded) -> int:
        noted.append(keys.tokens)
        return keys.tokens

    for block in range(20):
        tier.append(*(x[:, :, block * BLOCK : (block + 1) * BLOCK] for x in (k, v)))
        assert tier.view.notes("test", note) == [page.tokens for page, _ in tier.pages]
    assert noted == 15 * [BLOCK] + [PAGE] + 4 * [BLOCK]
    tier.drop_front(2 * BLOCK)
    assert tier.view.notes("test", note) == [PAGE - 2 * BLOCK] + 4 * [BLOCK]


def test_steps_that_pack_nothing_keep_the_view_that_kernels_know() -> None:
    group = group_of("hqmq:4 + recent:16")
    feed(group, 200)
    (tier,) = group.chain.quantized
    view = tier.view
    feed(group, 3)
    assert tier.view is view
    feed(group, BLOCK)
    assert tier.view is not view


def group_of(text: str, sliding: int | None = None) -> SequenceGroup:
    spec = parse(text)
    return SequenceGroup(RetentionPolicy.of(spec, tuple(codecs.get(name) for name, _ in spec.codecs), sliding), 0, [0, 1])


def feed(group: SequenceGroup, count: int, spare: int = 0) -> None:
    group.end_step(group.begin_step(*pair(count, start=group.length), False, hold=spare))


@pytest.mark.parametrize("recent", [0, 1, 63, 64, 100])
def test_recent_holds_between_r_and_r_plus_63(recent: int) -> None:
    group = group_of(f"sink:4 + grouped:8 + recent:{recent}")
    for count in (1, 2, 3, 200, 1, 1, 64, 63, 1500, 1):
        feed(group, count)
        held = group.chain.held
        assert held["sink"] == min(4, group.length)
        assert held["quantized"] % BLOCK == 0
        assert sum(held.values()) == group.length
        if held["quantized"]:
            assert recent <= held["recent"] <= recent + 63
        assert places(group.chain.recent) == list(range(group.length - held["recent"], group.length))


def test_limit_drops_the_oldest_whole_blocks() -> None:
    one, many = group_of("sink:2 + grouped:8@200 + recent:10"), group_of("sink:2 + grouped:8@200 + recent:10")
    feed(one, 1000)
    for _ in range(1000):
        feed(many, 1)
    for group in (one, many):
        assert group.chain.held["quantized"] == 192
        assert group.chain.dropped == 1000 - 2 - 192 - group.chain.held["recent"]
    assert [p.start for p in one.chain.sources()] == [0, 2 + one.chain.dropped, 1000 - one.chain.held["recent"]]


@pytest.mark.parametrize("spec", ["dense", "grouped:8 + recent:16", "window:300", "grouped:8 + recent:500", "grouped:8"])
def test_a_sliding_layer_keeps_what_can_still_be_seen(spec: str) -> None:
    group = group_of(spec, sliding=100)
    for count in (1, 250, 1, 1, 1, 700, 1):
        feed(group, count)
        total = sum(group.chain.held.values())
        assert min(group.length, 99) <= total <= 99 + 2 * BLOCK
        assert group.chain.dropped == group.length - total


def test_crop() -> None:
    group = group_of("sink:4 + grouped:8 + recent:16")
    feed(group, 300)
    assert group.chain.held == {"sink": 4, "quantized": 256, "recent": 40}
    group.crop(10)
    assert group.chain.held == {"sink": 4, "quantized": 256, "recent": 30}
    group.crop(40)  # 30 from recent, 10 from the last block, whose other tokens return to recent
    assert group.chain.held == {"sink": 4, "quantized": 192, "recent": 54}
    assert (group.chain.recent.keys[0, 0, :, 0] - torch.arange(196, 250)).abs().max() < 2
    group.crop(248)
    assert group.chain.held == {"sink": 2, "quantized": 0, "recent": 0}
    feed(group, 100)
    assert group.chain.held == {"sink": 4, "quantized": 64, "recent": 34}


def test_crop_after_recording_leaves_no_trace() -> None:
    recorded, plain = group_of("grouped:8 + recent:16"), group_of("grouped:8 + recent:16")
    feed(recorded, 300, spare=RECORDED)
    feed(recorded, 100, spare=RECORDED)
    recorded.crop(100)
    recorded.evict_blocks()
    feed(plain, 300)
    assert recorded.chain.held == plain.chain.held
    for found, wanted in zip(recorded.chain.sources(), plain.chain.sources(), strict=True):
        pair = (part.held.decode() if isinstance(part.held, CompressedKV) else part.held for part in (found, wanted))
        torch.testing.assert_close(*pair, atol=0, rtol=0)


def test_crop_refuses_what_was_dropped() -> None:
    group = group_of("window:50")
    feed(group, 40)
    group.check_crop(40)  # nothing has been dropped yet
    feed(group, 200)
    with pytest.raises(ValueError, match="keeps a window of 50 tokens"):
        group.check_crop(100)
    limited = group_of("grouped:8@64")
    feed(limited, 640)
    limited.check_crop(64)
    with pytest.raises(ValueError, match="cannot be cropped to 500"):
        limited.check_crop(140)
