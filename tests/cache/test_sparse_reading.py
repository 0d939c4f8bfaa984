"""With `hqmq:4/top:2048` a query reads exactly the blocks with the highest estimates, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cache_models import logits, make, padding, relative, tokens
from torch import Tensor

import tessera
from tessera import codecs
from tessera.attention import over_tiers, select
from tessera.cache import parse
from tessera.kernels import AttendParams, CompressedKV, cpu, dispatch, reference
from tessera.tiers import KVSource

SPEC = "sink:4 + hqmq:4/top:128 + recent:16"


def pages(count: int, heads: int = 2, dim: int = 64, rows: int = 2) -> CompressedKV:
    codec = codecs.get("hqmq:4_nostats")
    k, v = torch.randn(2, rows, heads, count, dim).unbind(0)
    k = k + torch.randn(rows, heads, 1, dim) + torch.randn(rows, heads, count // 64, dim).repeat_interleave(64, 2)
    cuts = (count // 128 * 64, count - count // 128 * 64)
    return CompressedKV(
        [(codec.encode(a, "key"), codec.encode(b, "value")) for a, b in zip(k.split(cuts, 2), v.split(cuts, 2), strict=True)]
    )


def test_the_words_say_how_much_is_read() -> None:
    spec = parse("sink:4 + hqmq:4@32768/top:2048 + hqmq:3/top:1024 + recent:128")
    assert str(spec) == "sink:4 + hqmq:4@32768/top:2048 + hqmq:3/top:1024 + recent:128"
    assert (spec.top("hqmq:4"), spec.top("hqmq:3"), parse("hqmq:4").top("hqmq:4")) == (2048, 1024, None)
    assert str(parse("(k=hqmq:4,v=q4_0)/top:64")) == "(k=hqmq:4,v=q4_0)/top:64"
    for wrong, match in (
        ("q4_0/top:2048", "keeps no mean of each block"),
        ("hqmq:4_nocentre/top:64", "keeps no mean of each block"),
        ("hqmq:4/top:100", "in blocks of 64"),
        ("hqmq:4/top:0", "in blocks of 64"),
        ("hqmq:4/best:64", r"as in 'hqmq:4/top:2048'"),
        ("hqmq:4/top:x", "needs a whole number"),
    ):
        with pytest.raises(ValueError, match=match):
            parse(wrong)


def test_blocks_are_chosen_by_their_means_and_widths() -> None:
    held, q = pages(640), torch.randn(2, 6, 3, 64)
    found = select.selected(q, held, 192, AttendParams(0.125))
    k = torch.cat([keys.decode() for keys, _ in held.pages], 2)
    for row, head, query in ((0, 0, 0), (1, 5, 2), (0, 4, 1)):
        group = q[row, head // 3 * 3 : head // 3 * 3 + 3, query]
        best = []
        for block in range(10):
            inside = k[row, head // 3, block * 64 : block * 64 + 64]
            mean = inside.mean(0)
            width = (inside - mean).square().mean(-1).sqrt().max()
            best.append(float((group @ mean + select.SPREAD * group.norm(dim=-1) * width).max()))
        chosen = sorted(sorted(range(10), key=lambda i: -best[i])[:3])
        # Means are stored in half precision and widths in a byte; the choice must not depend on these roundings.
        gap = sorted(best, reverse=True)
        if gap[2] - gap[3] > 0.05 * abs(gap[2]):
            assert found[row, head, query].view(10, 64).all(-1).nonzero().flatten().tolist() == chosen
        assert int(found[row, head, query].sum()) == 192


@pytest.mark.parametrize("level", [None, *cpu.levels()])
def test_what_is_not_chosen_is_not_read(level: str | None) -> None:
    """Corrupting the blocks that were not chosen does not change a bit of the result."""
    held, q = pages(1024), torch.randn(2, 4, 2, 64)
    seen = select.selected(q, held, 256, AttendParams(0.125))
    wanted = reference.attend(q, held, AttendParams(0.125, seen))[0]
    backend = "auto" if level is None else f"cpu:{level}"
    found = dispatch.attend(q, held, AttendParams(0.125, seen), backend=backend)[0]
    assert relative(found, wanted) < 1e-4
    if not cpu.levels():
        pytest.skip(f"no kernel leaves blocks out here: {cpu.MISSING}")
    free = ~seen.view(2, 2, 2, 2, 1024).any(2).any(2)  # of all queries of a key head
    at = 0
    for keys, values in held.pages:
        for packed in (keys, values):
            packed.tensors["scale"][free[:, :, at : at + packed.tokens]] = 255
            packed.tensors["codes"][free[:, :, at : at + packed.tokens]] = 77
        at += keys.tokens
    again = dispatch.attend(q, CompressedKV(list(held.pages)), AttendParams(0.125, seen), backend=backend)[0]
    assert torch.equal(again, found)


@pytest.mark.parametrize("top", [64, 128, 320])
def test_attention_is_softmax_over_what_is_chosen(top: int, monkeypatch: pytest.MonkeyPatch) -> None:
    held, q = pages(320), torch.randn(2, 4, 70, 64)
    source = KVSource(held, 0, 320, top=top)
    found, lse = over_tiers._sparsely(q, source, AttendParams(0.125))
    k, v = (x.repeat_interleave(2, 1) for x in held.decode())
    seen = select.selected(q, held, top, AttendParams(0.125))
    scores = (q @ k.mT * 0.125).masked_fill(~seen, -torch.inf)
    assert relative(found, scores.softmax(-1) @ v) < 1e-3
    assert torch.allclose(lse, scores.logsumexp(-1), atol=1e-3)
    monkeypatch.setattr(select, "MOST", 1)  # one query at a time
    one_by_one, _ = over_tiers._sparsely(q, source, AttendParams(0.125))
    assert relative(one_by_one, found) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(500,), (300, 200), (450, *[1] * 50)])
def test_reading_everything_sparsely_is_reading_everything(cuts: tuple[int, ...]) -> None:
    model, ids, mask = make(), tokens(2, 500), padding((0, 60), 500)
    wanted = logits(model, tessera.Cache("sink:4 + hqmq:4 + recent:16", model), ids, cuts, mask)
    found = logits(model, tessera.Cache("sink:4 + hqmq:4/top:512 + recent:16", model), ids, cuts, mask)
    assert torch.equal(found, wanted)


@torch.no_grad()
def test_steps_read_so_many_tokens_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make(), tokens(2, 701)
    cache = tessera.Cache(SPEC, model)
    mask = padding((0, 100), 701)
    logits(model, cache, ids[:, :700], (700,), mask[:, :700])
    read: list[Tensor] = []
    attend = dispatch.attend

    def watch(q: Tensor, held: CompressedKV, params: AttendParams) -> Any:
        assert params.mask is not None
        read.append(params.mask.sum(-1).float())
        return attend(q, held, params)

    monkeypatch.setattr(dispatch, "attend", watch)
    logits(model, cache, ids[:, 700:], (1,), mask)
    assert read
    assert all(bool((counts == 128).all()) for counts in read)


@torch.no_grad()
def test_it_is_saved_cropped_and_reordered_as_before(tmp_path: Path) -> None:
    model, ids = make(), tokens(2, 420)
    cache = tessera.Cache(SPEC, model)
    logits(model, cache, ids[:, :410], (410,))
    cache.save(tmp_path / "c")
    again = tessera.Cache.load(tmp_path / "c", model)
    assert str(again.spec) == SPEC
    wanted = logits(model, cache, ids[:, 410:], (10,))
    assert torch.equal(logits(model, again, ids[:, 410:], (10,)), wanted)
    again.crop(-10)
    again.reorder_cache(torch.tensor([1, 0]))
    assert relative(logits(model, again, ids[[1, 0], 410:], (10,)), wanted[[1, 0]]) < 1e-4


def test_what_a_query_does_not_see_takes_no_place() -> None:
    """Blocks hidden by the mask, or by position, do not displace visible ones."""
    held, q = pages(640), torch.randn(2, 4, 90, 64)
    mask = torch.rand(2, 1, 90, 10) < 0.4
    mask[..., 3] = True
    seen = mask.repeat_interleave(64, -1)
    for params in (AttendParams(0.125, seen), AttendParams(0.125, seen, start=500, window=300)):
        query = torch.arange(500, 590)[:, None] if params.start is not None else torch.full((90, 1), 10_000)
        near = torch.arange(10) * 64 + 64 > (query - 299 if params.window is not None else torch.zeros(90, 1))
        open_blocks = mask & near & (torch.arange(10) * 64 <= query)
        found = select.selected(q, held, 192, params).view(2, 4, 90, 10, 64)
        assert torch.equal(found.any(-1), found.all(-1))
        read = (found.any(-1) & open_blocks).sum(-1)
        assert torch.equal(read, open_blocks.sum(-1).clamp(max=3).expand(2, 4, 90))


@torch.no_grad()
def test_a_later_token_changes_no_choice_before_it() -> None:
    """With prefill="quantized" a call's own blocks are candidates, those after a query are not."""
    model, ids = make(), tokens(1, 660)
    other = ids.clone()
    other[:, 580:] = tokens(1, 80)
    found = [logits(model, tessera.Cache(SPEC, model, prefill="quantized"), given, (660,))[:, :500] for given in (ids, other)]
    assert relative(*found) < 1e-5
