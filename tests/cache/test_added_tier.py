"""A tier registered by one file works like the built-in tiers, in the position that the specification gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cache_models import logits, make, padding, relative, tokens
from stride_tier import StrideTier
from torch import Tensor

import tessera
from tessera.cache import parse
from tessera.tiers import added_tiers

SPECS = ("sink:3 + stride:4 + recent:16", "sink:3 + hqmq:4_nostats@128 + stride:8 + recent:16")


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v


def test_the_words_name_it() -> None:
    assert str(parse("recent:16 + sink:3 + stride:4")) == SPECS[0]
    assert isinstance(added_tiers.make("stride:4"), StrideTier)
    assert parse(SPECS[1]).others == ("stride:8",)
    for spec, match in (
        ("sink:3 + stride:5 + recent:16", r"a stride must divide 64, such as 4; got '5'"),
        ("sink:3 + strid:4 + recent:16", "did you mean 'stride'"),
        ("stride:4 + window:8", "does not go together with 'window'"),
        ("hqmq:4 + stride:4", "give it a limit"),
    ):
        with pytest.raises(ValueError, match=match):
            parse(spec)


@torch.no_grad()
def test_queries_read_the_sinks_every_fourth_token_and_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The expected result is plain attention over the sinks, every fourth token that has left, and the remaining tokens."""
    given: list[tuple[Tensor, Tensor, Tensor]] = []
    model, ids = make(num_hidden_layers=1), tokens(2, 301)
    cache = tessera.Cache(SPECS[0], model)
    from tessera.attention import over_tiers

    fused = over_tiers._attend

    def watch(q: Tensor, *args: Any) -> Tensor:
        given.append((q, fused(q, *args), q))
        return given[-1][1]

    plain = tessera.Cache("dense", model)
    logits(model, plain, ids, (301,))
    k, v = (x[:, :, :301] for x in plain.layers[0].dense())
    logits(model, cache, ids[:, :300], (200, 100))
    monkeypatch.setattr(over_tiers, "_attend", watch)
    logits(model, cache, ids[:, 300:], (1,))
    gone = (300 - 3 - 16) // 64 * 64
    seen = torch.zeros(301, dtype=torch.bool)
    seen[:3] = seen[3 : 3 + gone : 4] = seen[3 + gone :] = True
    q, found, _ = given[0]
    assert relative(found, attention(q, k, v, seen)) < 1e-5
    held = cache.layers[0].groups[0].chain.held
    assert held == {"sink": 3, "stride:4": gone, "recent": 301 - 3 - gone}


@torch.no_grad()
@pytest.mark.parametrize("spec", SPECS)
def test_it_lives_as_the_others_do(spec: str, tmp_path: Path) -> None:
    model, ids, mask = make(), tokens(3, 420), padding((0, 30, 0), 420)
    whole, cut = tessera.Cache(spec, model), tessera.Cache(spec, model)
    logits(model, whole, ids[:, :400], (400,), mask[:, :400])
    logits(model, cut, ids[:, :400], (50,) * 8, mask[:, :400])
    assert [layer.held() for layer in whole.layers] == [layer.held() for layer in cut.layers]
    whole.save(tmp_path / "c")
    again = tessera.Cache.load(tmp_path / "c", model)
    wanted = logits(model, whole, ids[:, 400:], (20,), mask)
    assert torch.equal(logits(model, again, ids[:, 400:], (20,), mask), wanted)
    order = torch.tensor([2, 0])
    whole.reorder_cache(order)
    alone = logits(model, whole, ids[order][:, :5], (5,), torch.cat((mask[order], torch.ones(2, 5, dtype=mask.dtype)), 1))
    assert alone.isfinite().all()
    report = again.report()
    assert report.tiers[next(name for name in report.tiers if name.startswith("stride"))] > 0
    with pytest.raises(ValueError, match="cannot be cropped"):
        again.crop(-400)


@torch.no_grad()
def test_a_mask_that_hides_single_tokens_is_refused() -> None:
    model, ids = make(), tokens(1, 310)
    cache = tessera.Cache(SPECS[0], model)
    logits(model, cache, ids[:, :300], (300,))
    mask = torch.ones(1, 1, 10, 310, dtype=torch.bool).tril(300)
    mask[..., 40] = False
    with pytest.raises(ValueError, match="hides tokens"):
        model(ids[:, 300:], past_key_values=cache, attention_mask=mask)
