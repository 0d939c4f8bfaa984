"""A Tensor Cache with a transformers cache keeps its state, so the recurrence runs over new tokens only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cache_models import logits, make, padding, tokens
from test_attached_memory import CONFIG, attached
from torch import Tensor
from transformers import DynamicCache, StaticCache

import tessera
from tessera.adapters import attached_memory
from tessera.attention.past import BACK
from tessera.tensor_cache import TensorCache, TensorCacheConfig

LAYERS = 2
OPTIONS: list[dict[str, Any]] = [
    {},
    {"rule": "outer", "order": "read_first"},
    {"rule": "wedge", "decay": (10, 100)},
    {"slots": 2, "top_k": 1, "slow": (0.99, 0.5), "normalise_read": True},
    {"rates": "token", "gate": "token", "rotary": True},
]


def config(**changes: Any) -> TensorCacheConfig:
    return TensorCacheConfig(**{**CONFIG.to_dict(), **changes})


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Record the number of tokens of every run of the recurrence."""
    found: list[int] = []
    advance = TensorCache.advance

    def count(self: TensorCache, q: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(q.shape[2])
        return advance(self, q, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TensorCache, "advance", count)
        yield found


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_recurrence_runs_over_one_token_for_each_that_is_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = attached(), tokens(3, 140)
    mask = padding((0, 30, 5), 140)
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=200)
    with counted(monkeypatch) as ran:
        logits(model, cache, ids[:, :100], (100,), mask[:, :100])
        assert sum(ran) == LAYERS * 100
        ran.clear()
        logits(model, cache, ids[:, 100:], (1,) * 40, mask)
        assert ran == [1] * LAYERS * 40


@pytest.mark.parametrize("pads", [(0, 0), (0, 40)])
@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_what_is_kept_gives_what_is_computed_anew(number: int, pads: tuple[int, int]) -> None:
    model, ids = attached(config=config(**OPTIONS[number])), tokens(2, 160)
    mask = padding(pads, 160)
    mask[1, 90:97] = 0
    if not any(pads):
        mask[:] = 1
    with torch.no_grad():
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        wanted = model(ids, attention_mask=mask, position_ids=places, use_cache=False).logits[mask.bool()]
    for cuts in ((160,), (70, 1, 1, 1, 30, 57), (1,) * 50 + (110,), (80,) + (1,) * 80):
        found = logits(model, DynamicCache(config=model.config), ids, cuts, mask)[mask.bool()]
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("remove", [1, 5, BACK, 100, 139])
def test_behind_a_crop_little_is_written_again_unless_it_goes_back_far(remove: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = attached(), tokens(2, 200)
    mask = padding((0, 20), 200)
    cache = DynamicCache(config=model.config)
    logits(model, cache, torch.cat((ids[:, : 140 - remove], tokens(2, remove)), 1), (140,), mask[:, :140])
    cache.crop(-remove)
    with counted(monkeypatch) as ran:
        found = logits(model, cache, ids[:, 140 - remove :], (1, 59 + remove), mask)
    again = 140 - remove if remove > BACK else BACK - remove
    assert sum(ran) == LAYERS * (again + 60 + remove)
    plain = DynamicCache(config=model.config)
    wanted, real = logits(model, plain, ids, (200,), mask), mask[:, 140 - remove :].bool()
    torch.testing.assert_close(found[real], wanted[:, 140 - remove :][real], rtol=1e-3, atol=1e-3)


def test_drafts_that_are_taken_back_cost_no_run_over_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = attached(), tokens(1, 25).repeat(1, 4)
    wanted = model.generate(ids, max_new_tokens=30, do_sample=False, use_cache=False)
    with counted(monkeypatch) as ran:
        found = model.generate(ids, max_new_tokens=30, do_sample=False, prompt_lookup_num_tokens=5)
    assert torch.equal(found, wanted)
    # The prompt once, and for each new token at most its drafts and the tokens cropped before.
    assert sum(ran) < LAYERS * (100 + 30 * (5 + BACK + 6))
    assert max(ran[2 * LAYERS :]) <= BACK + 12


@pytest.mark.parametrize("cuts", [(40, 1, 1, 8), (12, 38), (50,)])
@torch.no_grad()
def test_documents_in_a_row_are_each_written_alone(cuts: tuple[int, ...]) -> None:
    """The second document begins within the second call, or within the first."""
    model = attached(config=config(window=4, sink=1))
    ids, begin = tokens(1, 50), 20
    number = (torch.arange(50) >= begin).long()
    seen = (torch.ones(50, 50, dtype=torch.bool).tril() & (number[:, None] == number))[None, None]
    places = torch.cat((torch.arange(begin), torch.arange(50 - begin)))[None]
    cache, parts, end = DynamicCache(config=model.config), [], 0
    for n in cuts:
        first, end = end, end + n
        given = {"attention_mask": seen[:, :, first:end, :end], "position_ids": places[:, first:end]}
        parts.append(model(ids[:, first:end], past_key_values=cache, **given).logits)
    alone = torch.cat([model(part, use_cache=False).logits for part in (ids[:, :begin], ids[:, begin:])], 1)
    torch.testing.assert_close(torch.cat(parts, 1), alone, rtol=1e-3, atol=1e-3)


def test_another_memory_writes_anew_what_the_first_had_written(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = attached(), tokens(2, 90)
    cache = DynamicCache(config=model.config)
    logits(model, cache, ids[:, :80], (80,))
    other = attached(config=config(rule="outer"))
    memories = attached_memory(other).layers
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.tensor_cache = memories[index]
    with counted(monkeypatch) as ran:
        logits(model, cache, ids[:, 80:], (1, 9))
    assert sum(ran) == LAYERS * 90


def test_gradients_flow_through_a_cache_and_nothing_of_them_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = attached(), tokens(1, 90)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :60], past_key_values=cache)
    found = model(ids[:, 60:], past_key_values=cache).logits
    torch.testing.assert_close(found, model(ids, use_cache=False).logits[:, 60:], rtol=1e-3, atol=1e-3)
    found.square().sum().backward()
    # This includes gradients of how earlier tokens were written, although those were computed without gradients.
    learned = [p for name, p in model.named_parameters() if "tensor_cache" in name]
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in learned)
    more = tokens(1, 5)
    with counted(monkeypatch) as ran:
        plain = logits(model, cache, more, (4, 1))
    assert sum(ran) == LAYERS * 95
    whole = logits(model, DynamicCache(config=model.config), torch.cat((ids, more), 1), (95,))[:, 90:]
    torch.testing.assert_close(plain, whole, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_keys_that_are_not_finite_are_refused_before_they_are_written() -> None:
    model, ids = attached(), tokens(1, 60)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="keys must be finite"):
        model(inputs_embeds=torch.full((1, 2, model.config.hidden_size), torch.nan), past_key_values=cache)


def test_a_cache_filled_without_the_memory_is_refused() -> None:
    plain = make()
    cache = DynamicCache(config=plain.config)
    logits(plain, cache, tokens(1, 30), (30,))
    model = tessera.attach(plain, CONFIG)
    with pytest.raises(ValueError, match="holds 30 tokens of 1 rows, of which the Tensor Cache has seen 0"):
        logits(model, cache, tokens(1, 2), (2,))
