"""A call of a model makes the host wait for the device once, regardless of tokens, layers, tiers and masks.

The tests count the operations by which Python reads a number of a tensor, on the CPU as on a GPU. Errors that the CPU would
raise immediately are deferred here as on a GPU.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_models import FAMILIES, logits, make, padding, tokens
from test_attached_memory import CONFIG, SPEC, attached
from test_attached_tensor_memory import attached as attached_tensor_memory
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

import sink_models
import tessera
from tessera.adapters import attached_memory
from tessera.cache_layers.layer_states import state_of
from tessera.kernels import cpu
from tessera.tensor_cache import TensorCacheConfig

#: The backend of a GPU without Triton.
pytestmark = pytest.mark.skipif(
    cpu.MISSING is not None, reason="without kernels the search for codewords waits, see docs/devices.md"
)

#: `numpy` is not counted, because it works only on CPU tensors.
LOOKS = ("item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__", "__contains__")
LOOKS += ("nonzero", "unique", "unique_consecutive", "equal", "allclose")
HQMQ = "sink:4 + hqmq:4 + recent:16"
SPECS = [HQMQ, "sink:4 + hqmq:4@128 + recent:16", "window:32", SPEC, "sink:3 + hqmq:4@64 + recent:24 + tc"]
#: Further specifications for other kinds of calls: a chain, sparse reading, no sinks, a model's own windows.
MORE = ["sink:4 + hqmq:4@64 + hqmq:3@128 + recent:16", "sink:4 + hqmq:4/top:64 + recent:16", "hqmq:4 + recent:16"]


class Looks(TorchFunctionMode):
    """Counts the operations in which the host waits for a device, by name: reads, blocking uploads, and boolean indices.

    Tensors that were made on the host without naming a device, or were copied there, are host tensors: reading them costs
    nothing. Copying one to a device is a wait, unless it is non-blocking.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        own = [getattr(x, "on_host", False) for x in given]
        named = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, torch.device)]
        down = name == "cpu" or (name == "to" and "cpu" in [x for x in (*args[1:], *kwargs.values()) if isinstance(x, str)])
        up = bool(named) and (name == "new_tensor" or not given or own[0])
        if (name in LOOKS or down) and not all(own):
            self.found[name] += 1
        if up and name in ("tensor", "as_tensor", "new_tensor", "to") and not kwargs.get("non_blocking"):
            self.found["upload"] += 1
        if name == "new_tensor" and not named:
            self.found["upload"] += 1
        if name in ("__getitem__", "__setitem__", "masked_select") and not all(own):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.found["boolean index"] += any(isinstance(x, Tensor) and x.dtype == torch.bool for x in index)
            self.found["list as index"] += any(isinstance(x, list) for x in index)
        out = function(*args, **kwargs)
        if ((up and name == "to") or (down and not all(own))) and out is args[0]:
            out = out.view_as(out)  # on another device it would be a new tensor
        # Results of CPU kernels count as being on the model's device.
        made = "kernels" not in sys._getframe(1).f_code.co_filename
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (down or (all(own) and not named and (given or made))):
                x.on_host = True
        return out


def deferred(cache: tessera.Cache) -> tessera.Cache:
    """Make the cache behave as on a GPU."""
    cache.layers[0].policy.finite.at_once = False
    return cache


def model_for(spec: str, **changes: Any) -> Any:
    if "tc" not in spec:
        return make(num_hidden_layers=4, **changes)
    config = CONFIG if spec == SPEC else TensorCacheConfig(**{**CONFIG.to_dict(), "window": 24})
    return attached(config=config, num_hidden_layers=4)


def kept(cache: tessera.Cache) -> list[Tensor]:
    """Return everything that is stored, without free space."""
    found: list[Tensor] = []
    for chain in (group.chain for layer in cache.layers for group in layer.groups):
        found += [x for tier in (chain.sink, chain.recent) if tier.tokens for x in (tier.keys, tier.values)]
        for tier in chain.quantized:
            found += [tensor for page in tier.pages for packed in page for tensor in packed.tensors.values()]
        if chain.tensor_cache is not None and chain.tensor_cache.state is not None:
            found += chain.tensor_cache.state.tensors().values()
    return found


def looks(model: Any, cache: Any, ids: Tensor, mask: Tensor | None) -> list[Counter[str]]:
    """Return the counted reads of each call of a decoder for one more token."""
    found = []
    for end in range(cache.get_seq_length() + 1, ids.shape[1] + 1):
        given = None if mask is None else mask[:, :end]
        with torch.no_grad(), Looks() as seen:
            model(ids[:, end - 1 : end], attention_mask=given, past_key_values=cache)
        found.append(+seen.found)
    return found


def test_every_way_to_wait_is_counted_and_nothing_else() -> None:
    x = torch.arange(3)
    with Looks() as seen:
        x[0].item(), x.tolist(), x.cpu(), bool(x[0]), int(x[0]), float(x[0]), [0, 1, 2][x[1]], 1 in x
        x.nonzero(), x.unique(), x.unique_consecutive(), x.equal(x + 1), x.allclose(x)
        x.to("cpu"), x.to(device="cpu"), x[x > 0], x.float()
        if (x >= 0).all():
            x[x > 0] = 1
    assert seen.found == Counter({**dict.fromkeys(LOOKS, 1), "__bool__": 2, "to": 2, "boolean index": 2, "list as index": 0})
    with Looks() as seen:
        own = torch.tensor([2, 0]) + torch.arange(2)
        own.tolist(), own[own > 1], bool(own.any()), x.cpu()[0].item(), torch.as_tensor(own.numpy()).tolist()
        x[own.to(x.device, non_blocking=True)] + x.new_zeros(2, dtype=torch.long)
    assert +seen.found == Counter(cpu=1)
    with Looks() as seen:
        x[own.to(x.device)], torch.tensor([1], device=x.device), x.new_tensor([1]), x[[0, 1]]
        own.to(x.device).tolist()
    assert +seen.found == Counter({"upload": 4, "list as index": 1, "tolist": 1})


@pytest.mark.parametrize("how", ["no mask", "ones", "padding", "padding within"])
@pytest.mark.parametrize("spec", SPECS)
def test_a_decoded_token_costs_one_look_at_most(spec: str, how: str) -> None:
    """The test spans more than a block of tokens, so that some are encoded and dropped."""
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
    # Deferring has no other effect.
    assert [layer.held() for layer in cache.layers] == [layer.held() for layer in plain.layers]
    for one, other in zip(kept(cache), kept(plain), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("how", ["no mask", "padding within"])
@pytest.mark.parametrize("model_of", [*SPECS, *MORE, "gemma3", "mistral", "gemma3 with a Tensor Memory"])
def test_every_call_costs_one_look_at_most(model_of: str, how: str) -> None:
    """The calls are a prompt, chunks, tokens and beams."""
    family = model_of.split()[0]
    spec = HQMQ if family in FAMILIES else model_of
    if model_of.endswith("Tensor Memory"):
        model = attached_tensor_memory(family)
    else:
        model = make(family) if family in FAMILIES else model_for(spec)
    ids, mask = tokens(3, 330), None if how == "no mask" else padding((0, 13, 70), 330)
    if mask is not None:
        mask[0, 280:286], mask[1, 321] = 0, 0
    with torch.no_grad():
        model(ids[:, :200], past_key_values=tessera.Cache(spec, model))  # builds the cached tables
    cache, end, found = deferred(tessera.Cache(spec, model)), 0, {}
    for count in (220, 80, 12, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1):
        end += count
        with torch.no_grad(), Looks() as seen:
            if count:
                given = None if mask is None else mask[:, :end]
                model(ids[:, end - count : end], attention_mask=given, past_key_values=cache)
            else:
                order = torch.tensor([1, 0, 2])
                ids, mask = ids[order], None if mask is None else mask[order]
                cache.reorder_cache(order.view_as(order))
        found[f"{count} tokens up to {end}"] = +seen.found
    assert max(seen.total() for seen in found.values()) <= 1, found
    if mask is not None:
        assert min(seen.total() for made, seen in found.items() if made[0] != "0") == 1, found


def test_a_tensor_memory_beside_a_cache_of_transformers_costs_one_look() -> None:
    model, ids, mask = tessera.enable(attached_tensor_memory()), tokens(2, 60), padding((0, 9), 60)
    cache = DynamicCache(config=model.config)
    with Looks():  # which then tracks host tensors
        logits(model, cache, ids[:, :40], (40,), mask[:, :40])
    stream = next(state for state in map(_stream, cache.layers) if state is not None)
    stream.finite.at_once = False
    assert all((+seen).total() == 1 for seen in looks(model, cache, ids, mask))
    nothing = torch.full((2, 1, model.config.hidden_size), torch.inf)
    with torch.no_grad(), pytest.raises(ValueError, match="inputs_embeds must be finite"):
        model(inputs_embeds=nothing, attention_mask=torch.ones(2, 61), past_key_values=cache)


def _stream(layer: Any) -> Any:
    return state_of(layer, "tensor_memory")


def square(row: Tensor, queries: int) -> Tensor:
    """Return the mask of the newest queries, (rows, 1, queries, slots), as a caller makes it from a padding mask."""
    slots = row.shape[1]
    causal = torch.ones(slots, slots, dtype=torch.bool).tril()
    return (causal & row[:, None].bool())[:, None, slots - queries :].clone()


@pytest.mark.parametrize("how", ["no mask", "ones", "padding", "padding within", "made", "added", "documents"])
@pytest.mark.parametrize("kind", [{}, {"write": "chunk_means", "rule": "outer"}, {"layers": (1, 3)}], ids=str)
def test_a_tensor_cache_beside_a_cache_of_transformers_costs_one_look(kind: dict[str, Any], how: str) -> None:
    """This includes models in which only some layers have a memory."""
    model = attached(config=TensorCacheConfig(**{**CONFIG.to_dict(), **kind}), num_hidden_layers=4)
    ids, mask = tokens(3, 90), padding((0, 0, 0) if how == "ones" else (0, 9, 30), 90)
    if how != "ones":
        mask[0, 50:53], mask[1, 81] = 0, 0

    def call(cache: Any, end: int, count: int) -> Tensor:
        given: Tensor | None = mask[:, :end]
        if how == "no mask":
            given = None
        elif how in ("made", "added", "documents"):
            given = square(mask[:, :end], count)
            if how == "documents" and end > 70:
                given[:, :, max(0, count - end + 70) :, :70] = False
            if how == "added":
                given = torch.zeros(given.shape).masked_fill(~given, torch.finfo(torch.float32).min)
        out: Tensor = model(ids[:, end - count : end], attention_mask=given, past_key_values=cache).logits
        return out

    cache, plain, end, found = DynamicCache(config=model.config), DynamicCache(config=model.config), 0, {}
    with torch.no_grad():
        call(DynamicCache(config=model.config), 40, 40)  # builds the cached tables
        for count in (40, 12, 1, 1, 20, 1, 1, 1, 1, 1, 1, 1, 1):
            end += count
            with Looks() as seen:
                given = call(cache, end, count)
            found[f"{count} tokens up to {end}"] = +seen.found
            assert torch.equal(given, call(plain, end, count))
            for state in filter(None, (state_of(layer, "tensor_cache") for layer in cache.layers)):
                state.finite.at_once = False
    assert max(seen.total() for name, seen in found.items() if not name.startswith("40")) <= 1, found
    if how != "no mask":
        assert min(seen.total() for seen in found.values()) >= 1, found


def test_what_a_tensor_cache_finds_beside_a_cache_of_transformers_is_told_by_the_next_call() -> None:
    model, ids = attached(num_hidden_layers=4), tokens(2, 60)
    cache = DynamicCache(config=model.config)
    logits(model, cache, ids[:, :40], (40,))
    first = next(state for layer in cache.layers if (state := state_of(layer, "tensor_cache")))
    first.finite.at_once = False
    with torch.no_grad():
        model(inputs_embeds=torch.full((2, 1, model.config.hidden_size), torch.nan), past_key_values=cache)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"NaN or infinite.*call cache\.reset\(\)"):
                model(ids[:, :1], past_key_values=cache)
    cache.reset()
    wanted = logits(model, DynamicCache(config=model.config), ids[:, :41], (40, 1))
    assert torch.equal(logits(model, cache, ids[:, :41], (40, 1)), wanted)


def test_a_mask_that_a_caller_has_made_costs_one_look() -> None:
    """This includes masks that hide more than padding."""
    model, ids = make(num_hidden_layers=4), tokens(2, 60)
    whole = torch.ones(60, 60, dtype=torch.bool).tril().expand(2, 1, -1, -1).clone()
    whole[0, 0, :, :7] = False
    whole[1, 0, 50:, 20:30] = False
    for mask in (whole, torch.zeros(whole.shape).masked_fill(~whole, torch.finfo(torch.float32).min)):
        cache, end = deferred(tessera.Cache("dense", model)), 0
        for count in (40, 12, 1, 1, 6):
            end += count
            with torch.no_grad(), Looks() as seen:
                given = mask[:, :, end - count : end, :end]
                model(ids[:, end - count : end], attention_mask=given, past_key_values=cache)
            assert (+seen.found).total() == 1, seen.found


@pytest.mark.parametrize("fine", [True, False])
def test_what_a_tensor_memory_finds_is_told_by_the_next_call(fine: bool) -> None:
    model, ids = attached_tensor_memory(), tokens(1, 60)
    cache = deferred(tessera.Cache("dense", model))
    logits(model, cache, ids, (60,))
    shared = attached_memory(model).shared
    if not fine:
        with torch.no_grad():
            shared.content_net.bias.fill_(torch.nan)
    with torch.no_grad():
        model(ids[:, :3], past_key_values=cache)
        if fine:
            model(ids[:, :1], past_key_values=cache)
            return
        for _ in range(2):
            with pytest.raises(ValueError, match=r"NaN or infinite.*call cache\.reset\(\)"):
                model(ids[:, :1], past_key_values=cache)


def without_a_sink() -> tuple[Any, tessera.Cache, Tensor]:
    """Return a model with an attention sink, a cache without sinks that has read 100 tokens without a warning, and the
    tokens."""
    model = sink_models.make(sink=True)
    cache = deferred(tessera.Cache("q4_0", model))
    ids = torch.cat((torch.zeros(1, 1, dtype=torch.long), torch.randint(1, 257, (1, 99))), 1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        model(ids, past_key_values=cache)
    return model, cache, ids


def test_a_missing_sink_is_told_by_the_next_call() -> None:
    model, cache, ids = without_a_sink()
    with pytest.warns(UserWarning, match="draws .* of the attention of layer"), torch.no_grad():
        model(ids[:, 1:2], past_key_values=cache)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        model(ids[:, 1:2], past_key_values=cache)


def test_a_call_that_stops_at_a_warning_changes_nothing() -> None:
    model, cache, ids = without_a_sink()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"draws .* of the attention of layer"):
            model(ids[:, 1:2], past_key_values=cache)
        assert {layer.seen for layer in cache.layers} == {100}
        model(ids[:, 1:2], past_key_values=cache)
    assert {layer.seen for layer in cache.layers} == {101}


def test_a_cache_of_transformers_is_looked_at_no_more_often_than_before() -> None:
    model, ids = tessera.enable(make(num_hidden_layers=4)), tokens(2, 60)
    mask = torch.ones_like(ids)
    cache = DynamicCache(config=model.config)
    logits(model, cache, ids[:, :50], (50,), mask[:, :50])
    assert all((+seen).total() == 1 for seen in looks(model, cache, ids, mask))


# Deferred findings are not lost


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_not_finite_is_refused_by_the_next_call_and_until_a_reset(spec: str, tmp_path: Path) -> None:
    model, ids = model_for(spec), tokens(2, 200)
    cache = deferred(tessera.Cache(spec, model))
    logits(model, cache, ids[:, :150], (150,))
    nothing = torch.full((2, 100, model.config.hidden_size), torch.nan)
    with torch.no_grad():
        if "tc" in spec:
            # The first layer reads the flags before the mask, so that later tokens are checked in time.
            with pytest.raises(ValueError, match=r"NaN or infinite.*call cache\.reset\(\)"):
                model(inputs_embeds=nothing, past_key_values=cache)
        else:
            model(inputs_embeds=nothing, past_key_values=cache)
        if spec == "window:32":
            model(ids[:, :1], past_key_values=cache)  # keeps the flags unchanged, and then drops them
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


def test_what_is_not_finite_shows_in_all_logits_until_it_is_encoded_and_is_refused_from_then_on() -> None:
    model, ids = make(num_hidden_layers=4), tokens(1, 200)
    cache, shown = deferred(tessera.Cache(HQMQ, model)), 0
    logits(model, cache, ids[:, :40], (40,))
    with torch.no_grad():
        model(inputs_embeds=torch.full((1, 1, model.config.hidden_size), torch.nan), past_key_values=cache)
        while not cache.layers[0].policy.finite.broken and shown < 160:
            before, shown = shown, shown + 1
            with contextlib.suppress(ValueError):
                found = model(ids[:, before:shown], past_key_values=cache).logits
                assert not found.isfinite().any()
        assert 20 < shown < 100
        with pytest.raises(ValueError, match=r"NaN or infinite.*call cache\.reset\(\)"):
            model(ids[:, :1], past_key_values=cache)


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
    twin.save(tmp_path / "c")  # copies have separate flags


def test_on_a_cpu_and_where_it_is_asked_for_they_are_refused_at_once() -> None:
    model = model_for(SPEC)
    for at_once in (None, True):
        cache = tessera.Cache(SPEC, model)
        cache.layers[0].policy.finite.at_once = at_once
        logits(model, cache, tokens(1, 60), (60,))
        with pytest.raises(ValueError, match="keys must be finite"), torch.no_grad():
            model(inputs_embeds=torch.full((1, 2, model.config.hidden_size), torch.nan), past_key_values=cache)
        logits(model, cache, tokens(1, 5), (5,))


@pytest.mark.parametrize("how", ["made", "added", "by kind"])
@pytest.mark.parametrize("spec", ["dense", HQMQ, "of transformers"])
def test_a_mask_that_a_caller_has_made_costs_a_tensor_memory_one_look(spec: str, how: str) -> None:
    model, ids, padded = attached_tensor_memory("gemma3" if how == "by kind" else "llama"), tokens(2, 100), padding((0, 9), 100)
    padded[0, 85] = 0
    ours = spec != "of transformers"
    cache = deferred(tessera.Cache(spec, model)) if ours else DynamicCache(config=model.config)
    plain = tessera.Cache(spec, model) if ours else DynamicCache(config=model.config)
    end = 0
    for count in (60, 12, 1, 1, 6, 1, 1, 1, 1, 1):
        end += count
        mask: Any = square(padded[:, :end], count)
        if how == "added":
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        if how == "by kind":
            window = model.config.sliding_window
            near = torch.ones(end, end, dtype=torch.bool).triu(1 - window)[end - count :]
            first = max(0, end - count - window + 1)
            mask = {"full_attention": mask, "sliding_attention": (mask & near)[..., first:]}
        with torch.no_grad(), Looks() as seen:
            given = model(ids[:, end - count : end], attention_mask=mask, past_key_values=cache).logits
        if end > 60:
            assert (+seen.found).total() == 1, (end, seen.found)
        with torch.no_grad():
            assert torch.equal(given, model(ids[:, end - count : end], attention_mask=mask, past_key_values=plain).logits)
        if not ours and end == 60:
            next(state for state in map(_stream, cache.layers) if state is not None).finite.at_once = False


@pytest.mark.parametrize("how", ["padding", "made", "added"])
@pytest.mark.parametrize("memory", ["tensor_cache", "tensor_memory"])
def test_beams_cost_a_memory_beside_a_cache_of_transformers_one_look(memory: str, how: str) -> None:
    """Otherwise every layer would read its own copy of the row order."""
    made = attached if memory == "tensor_cache" else attached_tensor_memory
    model, ids, mask, order = tessera.enable(made()), tokens(3, 50), padding((0, 9, 4), 50), torch.tensor([2, 0, 0])
    cache = DynamicCache(config=model.config)
    wanted = logits(model, DynamicCache(config=model.config), ids[order][:, :41], (40, 1), mask[order][:, :41])
    with Looks():  # which then tracks host tensors
        logits(model, cache, ids[:, :40], (40,), mask[:, :40])
    for layer in cache.layers:
        if (state := state_of(layer, memory)) is not None and hasattr(state, "finite"):
            state.finite.at_once = False
    with torch.no_grad():
        rows = order.clone()
        with Looks() as seen:
            cache.reorder_cache(rows)
        assert (+seen.found).total() == 0
        rows.zero_()  # a caller may reuse the buffer
        beams = mask[order][:, :41]
        at = beams.sum(1, keepdim=True) - 1
        if how != "padding":
            beams = square(beams, 1)
        if how == "added":
            beams = torch.zeros(beams.shape).masked_fill(~beams, torch.finfo(torch.float32).min)
        with Looks() as seen:
            given = model(ids[order][:, 40:41], attention_mask=beams, position_ids=at, past_key_values=cache).logits
        assert (+seen.found).total() == 1, seen.found
    torch.testing.assert_close(given, wanted[:, 40:])


@pytest.mark.parametrize("spec", ["scalar:4", "q4_0 + recent:16", "int:4", "kivi:4", "fp8", "hqmq:o170_r4"])
def test_codecs_without_a_kernel_cost_one_look(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_BACKEND", "reference")
    model, ids, mask = make(), tokens(2, 150), padding((0, 9), 150)
    cache = deferred(tessera.Cache(spec, model))
    logits(model, cache, ids[:, :70], (70,), mask[:, :70])
    assert max(seen.total() for seen in looks(model, cache, ids, mask)) == 1


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("spec", ["sink:4 + hqmq:s96_r4_med3 + recent:16", "hqmq:s24_r2_med3@128 + recent:16"])
def test_how_many_outliers_there_are_is_read_with_the_next_mask(
    spec: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number determines the stored bytes; for more than one block of tokens it is read immediately."""
    monkeypatch.setenv("TESSERA_BACKEND", backend)
    model, ids, mask = make(), tokens(2, 330), padding((0, 9), 330)
    cache, plain = deferred(tessera.Cache(spec, model)), tessera.Cache(spec, model)
    with Looks():
        logits(model, cache, ids[:, :140], (140,), mask[:, :140])
    found = looks(model, cache, ids, mask)
    assert max(seen.total() for seen in found) == 1, Counter(map(str, found))
    logits(model, plain, ids[:, :140], (140,), mask[:, :140])
    for end in range(141, 331):
        with torch.no_grad():
            model(ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=plain)
    for one, other in zip(kept(cache), kept(plain), strict=True):
        assert torch.equal(one, other)
