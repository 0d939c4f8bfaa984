"""Tokens of the calls since the last crop can be removed without any remaining effect."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_models import logits, make, tokens
from test_masks import MEMORY, TC, attached
from torch import Tensor
from transformers import DynamicCache

import tessera
from tessera.cache_layers.group import RECORDED
from tessera.kernels import cpu
from tessera.tensor_cache import TensorCacheConfig

SPECS = ["dense", "window:24", "sink:4 + hqmq:4 + recent:16", "hqmq:4@128 + recent:16", TC]


def model_for(spec: str) -> Any:
    return attached() if "tc" in spec else make()


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("order", ["write_first", "read_first"])
def test_assisted_generation_with_a_memory_is_generation(rotary: bool, order: str) -> None:
    config = TensorCacheConfig(**{**MEMORY.to_dict(), "rotary": rotary, "order": order})
    model, ids = attached(config=config), tokens(1, 20).repeat(1, 4)
    wanted = model.generate(ids, past_key_values=tessera.Cache(TC, model), max_new_tokens=40, do_sample=False)
    for cache in (tessera.Cache(TC, model), DynamicCache(config=model.config)):
        # Drafts come from the prompt; a random model rarely accepts them, so most are cropped.
        drafted = {"max_new_tokens": 40, "do_sample": False, "prompt_lookup_num_tokens": 5}
        found = model.generate(ids, past_key_values=cache, **drafted)
        assert torch.equal(found, wanted)
        more = torch.cat((found, tokens(1, 30)), dim=1)
        again = model.generate(more, past_key_values=cache, max_new_tokens=10, do_sample=False)
        assert torch.equal(again, model.generate(more, max_new_tokens=10, do_sample=False))


@pytest.mark.parametrize("spec", SPECS)
def test_what_a_memory_has_written_since_is_taken_back_whole(spec: str) -> None:
    model, ids, wrong, more = model_for(spec), tokens(2, 150), tokens(2, 90), tokens(2, 50)
    plain, cropped = tessera.Cache(spec, model), tessera.Cache(spec, model)
    logits(model, plain, ids, (150,))
    logits(model, cropped, ids, (150,))
    for cuts in ((1,), (5,), (40, 50), (70,)):
        cropped.activate_past_recording()
        logits(model, cropped, wrong[:, : sum(cuts)], cuts)
        cropped.crop(-sum(cuts))
    found, wanted = logits(model, cropped, more, (49, 1)), logits(model, plain, more, (49, 1))
    if cpu.MISSING is None:
        assert torch.equal(found, wanted)
    else:  # the recurrence in PyTorch adds up whole chunks of writes, which begin where calls did
        torch.testing.assert_close(found, wanted, rtol=0, atol=5e-6)
    assert cropped.report() == plain.report()


@pytest.mark.parametrize("spec", SPECS)
def test_recording_ends_with_the_crop_it_waited_for(spec: str) -> None:
    """A cropped cache therefore stores the same as one that never read the cropped tokens."""
    model, ids = model_for(spec), tokens(1, 20).repeat(1, 10)
    cache = tessera.Cache(spec, model)
    found = model.generate(ids, past_key_values=cache, max_new_tokens=30, do_sample=False, prompt_lookup_num_tokens=4)
    assert not any(layer.record_past for layer in cache.layers)
    plain = tessera.Cache(spec, model)
    logits(model, plain, found[:, :-1], (found.shape[1] - 1,))
    if spec != TC:  # a memory writes pending pairs at the next call
        assert same_size(cache, plain)
    more = tokens(1, 120)
    for each in (cache, plain):
        logits(model, each, more, (60, 40, 20))
    assert same_size(cache, plain)


def same_size(one: tessera.Cache, other: tessera.Cache) -> bool:
    """Whether the same tokens are in the same tiers."""
    return [layer.held() for layer in one.layers] == [layer.held() for layer in other.layers]


@torch.no_grad()
def test_a_row_that_waits_while_recording_ends_keeps_no_more_than_one_that_goes_on() -> None:
    model, ids, more = attached(), tokens(2, 180), tokens(2, 60)
    waited, plain = tessera.Cache(TC, model), tessera.Cache(TC, model)
    mask = torch.ones(2, 190, dtype=torch.long)
    mask[1, 180:] = 0
    logits(model, waited, ids[:, :60], (60,))
    waited.activate_past_recording()
    logits(model, waited, ids[:, 60:179], (119,))
    waited.crop(0)
    logits(model, waited, ids[:, 179:], (1,))  # recorded too
    logits(model, plain, ids, (180,))
    for cache in (waited, plain):
        # The second row of this call is padding only.
        model(more[:, :10], attention_mask=mask, past_key_values=cache)
    assert same_size(waited, plain)
    assert waited.report() == plain.report()
    longer = torch.cat((mask, torch.ones(2, 50, dtype=torch.long)), dim=1)
    found, wanted = (model(more[:, 10:], attention_mask=longer, past_key_values=cache).logits for cache in (waited, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_a_crop_gives_back_the_memory_of_what_it_takes() -> None:
    model = attached()
    cache = tessera.Cache(TC, model)
    logits(model, cache, tokens(2, 60), (60,))
    cache.activate_past_recording()
    logits(model, cache, tokens(2, 100), (100,))
    cache.crop(-100)
    held = [t for layer in cache.layers for tensors in layer.buffers().values() for t in tensors]
    # A view keeps its whole storage alive.
    assert sum(t.untyped_storage().nbytes() for t in held) == cache.report().nbytes


def test_a_memory_writes_for_good_what_is_older_than_can_be_taken_back() -> None:
    model = attached(num_hidden_layers=1)
    cache, plain = tessera.Cache(TC, model), tessera.Cache(TC, model)
    ids = tokens(1, RECORDED + 200)
    cache.activate_past_recording()
    found = logits(model, cache, ids, (100, RECORDED, 100))
    torch.testing.assert_close(found, logits(model, plain, ids, (RECORDED + 200,)), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="nothing can be taken back"):
        cache.crop(-RECORDED - 100)
    cache.crop(-RECORDED)
    again = logits(model, cache, ids[:, 200:], (RECORDED,))
    torch.testing.assert_close(again, found[:, 200:], rtol=1e-3, atol=1e-3)


def test_one_activation_serves_for_every_call_that_is_cropped() -> None:
    model, ids = attached(), tokens(1, 200)
    cache = tessera.Cache(TC, model)
    whole = logits(model, tessera.Cache(TC, model), ids, (200,))
    logits(model, cache, ids[:, :60], (60,))
    cache.activate_past_recording()
    found: list[Tensor] = []
    for begin in range(60, 200, 10):
        found.append(logits(model, cache, ids[:, begin : begin + 10], (10,)))
        logits_of_drafts = logits(model, cache, tokens(1, 3), (3,)) if begin == 60 else None
        cache.crop(-3 if logits_of_drafts is not None else 0)
    torch.testing.assert_close(torch.cat(found, dim=1), whole[:, 60:], rtol=1e-3, atol=1e-3)
    logits(model, cache, tokens(1, 2), (1, 1))  # no crop follows the first of these
    with pytest.raises(ValueError, match="activate_past_recording"):
        cache.crop(-2)
