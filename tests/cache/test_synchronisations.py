"""How often the host waits for a device while a token is decoded: once a call, however many layers there are.

Counted are the ways in which Python learns a number of a tensor, on the CPU as they would be on a GPU; what a CPU refuses at
once is deferred here as on a GPU.
"""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_models import logits, make, padding, tokens
from test_attached_memory import CONFIG, SPEC, attached
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

import tessera
from tessera.tensor_cache import TensorCacheConfig

#: Not `numpy`, which takes tensors of the CPU only.
LOOKS = ("item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__", "__contains__", "nonzero", "unique")
HQMQ = "sink:4 + hqmq:4 + recent:16"
SPECS = [HQMQ, "sink:4 + hqmq:4@128 + recent:16", "window:32", SPEC, "sink:3 + hqmq:4@64 + recent:24 + tc"]


class Looks(TorchFunctionMode):
    """Counts them by name, and with them boolean indices, whose number has to be known."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        kwargs = kwargs or {}
        # To the device of another tensor nothing is brought here: all of them are on one.
        if name in LOOKS or (name == "to" and "cpu" in [x for x in (*args[1:], *kwargs.values()) if isinstance(x, str)]):
            self.found[name] += 1
        if name in ("__getitem__", "__setitem__", "masked_select"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.found["boolean index"] += any(isinstance(x, Tensor) and x.dtype == torch.bool for x in index)
        return function(*args, **kwargs)


def deferred(cache: tessera.Cache) -> tessera.Cache:
    """The cache, as it would be on a GPU."""
    cache.layers[0].policy.finite.at_once = False
    return cache


def model_for(spec: str, **changes: Any) -> Any:
    if "tc" not in spec:
        return make(num_hidden_layers=4, **changes)
    config = CONFIG if spec == SPEC else TensorCacheConfig(**{**CONFIG.to_dict(), "window": 24})
    return attached(config=config, num_hidden_layers=4)


def kept(cache: tessera.Cache) -> list[Tensor]:
    """All that is held, without free room."""
    found: list[Tensor] = []
    for chain in (group.chain for layer in cache.layers for group in layer.groups):
        found += [x for tier in (chain.sink, chain.recent) if tier.tokens for x in (tier.keys, tier.values)]
        for tier in chain.quantized:
            found += [tensor for page in tier.pages for packed in page for tensor in packed.tensors.values()]
        if chain.tensor_cache is not None and chain.tensor_cache.state is not None:
            found += chain.tensor_cache.state.tensors().values()
    return found


def looks(model: Any, cache: Any, ids: Tensor, mask: Tensor | None) -> list[Counter[str]]:
    """What is looked at in each call of a decoder for one token more."""
    found = []
    for end in range(cache.get_seq_length() + 1, ids.shape[1] + 1):
        given = None if mask is None else mask[:, :end]
        with torch.no_grad(), Looks() as seen:
            model(ids[:, end - 1 : end], attention_mask=given, past_key_values=cache)
        found.append(seen.found)
    return found


def test_every_way_to_look_is_counted() -> None:
    x = torch.arange(3)
    with Looks() as seen:
        x[0].item(), x.tolist(), x.cpu(), bool(x[0]), int(x[0]), float(x[0]), [0, 1, 2][x[1]], 1 in x
        x.nonzero(), x.unique(), x.to("cpu"), x.to(device="cpu"), x[x > 0], x.float()
        if (x >= 0).all():
            x[x > 0] = 1
    assert seen.found == Counter({**dict.fromkeys(LOOKS, 1), "__bool__": 2, "to": 2, "boolean index": 2})


@pytest.mark.parametrize("how", ["no mask", "ones", "padding", "padding within"])
@pytest.mark.parametrize("spec", SPECS)
def test_a_decoded_token_costs_one_look_at_most(spec: str, how: str) -> None:
    """Over more than a block of tokens, so that some are encoded and dropped."""
    model, ids = model_for(spec), tokens(3, 320)
    mask = None if how == "no mask" else padding((0, 0, 0) if how == "ones" else (0, 13, 70), 320)
    if mask is not None and how == "padding within":
        mask[0, 230:236] = 0
    cache = deferred(tessera.Cache(spec, model))
    logits(model, cache, ids[:, :220], (220,), None if mask is None else mask[:, :220])
    found = looks(model, cache, ids, mask)
    assert max(seen.total() for seen in found) <= 1, Counter(str(seen) for seen in found)
    if mask is not None:
        assert all(seen.total() == 1 for seen in found)
    plain = tessera.Cache(spec, model)
    logits(model, plain, ids[:, :220], (220,), None if mask is None else mask[:, :220])
    for end in range(221, 321):
        with torch.no_grad():
            model(ids[:, end - 1 : end], attention_mask=None if mask is None else mask[:, :end], past_key_values=plain)
    # What is deferred changes nothing else.
    assert [layer.held() for layer in cache.layers] == [layer.held() for layer in plain.layers]
    for one, other in zip(kept(cache), kept(plain), strict=True):
        assert torch.equal(one, other)


def test_masks_of_two_kinds_cost_a_look_each() -> None:
    model, ids, mask = make("gemma3"), tokens(2, 90), padding((0, 9), 90)
    cache = deferred(tessera.Cache("dense", model))
    logits(model, cache, ids[:, :60], (60,), mask[:, :60])
    assert all(seen.total() <= 2 for seen in looks(model, cache, ids, mask))


def test_a_prefill_costs_two_looks_however_many_layers_there_are() -> None:
    mask, ids = padding((0, 13), 300), tokens(2, 300)
    for layers in (2, 6):
        model = make(num_hidden_layers=layers)
        cache = deferred(tessera.Cache("sink:4 + q4_0 + recent:16", model))
        with torch.no_grad(), Looks() as seen:
            model(ids, attention_mask=mask, past_key_values=cache)
        assert seen.found.total() <= 2, seen.found


def test_beams_cost_a_look_however_many_layers_there_are() -> None:
    model = make(num_hidden_layers=4)
    cache = tessera.Cache(HQMQ, model)
    logits(model, cache, tokens(4, 100), (100,))
    with Looks() as seen:
        cache.reorder_cache(torch.tensor([1, 0, 3, 3]))
    assert seen.found == Counter(tolist=1)


def test_a_cache_of_transformers_is_looked_at_no_more_often_than_before() -> None:
    model, ids = tessera.enable(make(num_hidden_layers=4)), tokens(2, 60)
    mask = torch.ones_like(ids)
    cache = DynamicCache(config=model.config)
    logits(model, cache, ids[:, :50], (50,), mask[:, :50])
    assert all(seen.total() == 1 for seen in looks(model, cache, ids, mask))


# What is found later is not lost


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_not_finite_is_refused_by_the_next_call_and_until_a_reset(spec: str, tmp_path: Path) -> None:
    model, ids = model_for(spec), tokens(2, 200)
    cache = deferred(tessera.Cache(spec, model))
    logits(model, cache, ids[:, :150], (150,))
    nothing = torch.full((2, 100, model.config.hidden_size), torch.nan)
    with torch.no_grad():
        if "tc" in spec:
            # The first layer looks before it reads the mask, so that what comes is known in time.
            with pytest.raises(ValueError, match=r"NaN or infinite.*call cache\.reset\(\)"):
                model(inputs_embeds=nothing, past_key_values=cache)
        else:
            model(inputs_embeds=nothing, past_key_values=cache)
        if spec == "window:32":
            model(ids[:, :1], past_key_values=cache)  # keeps them as they are, and forgets them
            return
        for _ in range(2):
            with pytest.raises(ValueError, match=r"NaN or infinite.*call cache\.reset\(\)"):
                model(ids[:, :1], past_key_values=cache)
        with pytest.raises(ValueError, match=r"call cache\.reset\(\)"):
            copy.deepcopy(cache).save(tmp_path / "c")
        assert not list(tmp_path.iterdir())
    cache.reset()
    wanted = logits(model, tessera.Cache(spec, model), ids, (150, 50))
    assert torch.equal(logits(model, cache, ids, (150, 50)), wanted)


@pytest.mark.parametrize("spec", [HQMQ, "sink:4 + q4_0"])
def test_a_save_finds_what_no_call_has_yet(spec: str, tmp_path: Path) -> None:
    model = model_for(spec)
    cache = deferred(tessera.Cache(spec, model))
    twin = copy.deepcopy(cache)
    with torch.no_grad():
        model(inputs_embeds=torch.full((1, 200, model.config.hidden_size), torch.nan), past_key_values=cache)
        model(tokens(1, 200), past_key_values=twin)
    with pytest.raises(ValueError, match="NaN or infinite"):
        cache.save(tmp_path / "c")
    twin.save(tmp_path / "c")  # what one copy has met the other has not


def test_on_a_cpu_and_where_it_is_asked_for_they_are_refused_at_once() -> None:
    model = model_for(SPEC)
    for at_once in (None, True):
        cache = tessera.Cache(SPEC, model)
        cache.layers[0].policy.finite.at_once = at_once
        logits(model, cache, tokens(1, 60), (60,))
        with pytest.raises(ValueError, match="keys must be finite"), torch.no_grad():
            model(inputs_embeds=torch.full((1, 2, model.config.hidden_size), torch.nan), past_key_values=cache)
        logits(model, cache, tokens(1, 5), (5,))
