"""Masks are applied exactly or refused: packed documents, bidirectional spans, padding anywhere, static buffers."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_models import VOCAB, make, relative, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, Gemma3ForConditionalGeneration, PaliGemmaForConditionalGeneration, StaticCache
from transformers.masking_utils import create_causal_mask, sdpa_mask, sliding_window_causal_mask_function

import tessera
from tessera.attention.documents import SlidingWindow
from tessera.attention.forward import mask_unless_causal
from tessera.attention.read_masks import read_documents
from tessera.cache_layers.masks import Runs
from tessera.cache_layers.new_tokens import Rule, read_mask
from tessera.cache_layers.padding_mask import PaddingMask
from tessera.readback import HostCopy
from tessera.tensor_cache import TensorCacheConfig

MEMORY = TensorCacheConfig(window=24, sink=3, chunk=16, decay=(10, 1000))
TC = "sink:3 + window:24 + tc"
#: Specifications of every kind: exact, bounded, lossy.
SPECS = ["dense", "sink:3 + window:24", "window:24", "sink:4 + hqmq:4 + recent:16", "q4_0@128 + recent:64"]


def attached(family: str = "llama", config: TensorCacheConfig = MEMORY, **changes: Any) -> Any:
    """Make a model with a Tensor Cache whose output is nonzero."""
    model = tessera.attach(make(family, **changes), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "tensor_cache.out" in name:
                p.normal_(0, 0.3)
    return model


def model_for(spec: str) -> Any:
    return attached() if "tc" in spec else make()


def cache_for(spec: str, model: Any) -> Any:
    return DynamicCache(config=model.config) if spec == "transformers" else tessera.Cache(spec, model)


def packed(lengths: tuple[int, ...]) -> Tensor:
    """Return a mask (1, 1, slots, slots) of documents of these lengths, each causal and isolated."""
    number = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return ((number[:, None] == number) & torch.ones(len(number), len(number), dtype=torch.bool).tril())[None, None]


def positions(lengths: tuple[int, ...]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


LENGTHS = (50, 7, 40)


@torch.no_grad()
@pytest.mark.parametrize("window", [512, 24])
def test_a_memory_begins_anew_with_each_packed_document(window: int) -> None:
    model, ids = attached(config=TensorCacheConfig(window=window, sink=3, chunk=16)), tokens(1, sum(LENGTHS))
    alone = torch.cat([model(part, use_cache=False).logits for part in ids.split(LENGTHS, 1)], dim=1)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    places, every = positions(LENGTHS), torch.ones_like(ids)
    given: list[dict[str, Any]] = [
        {"position_ids": places},
        {"position_ids": places, "attention_mask": packed(LENGTHS)},
        {"position_ids": places, "attention_mask": torch.zeros(1, 1, 97, 97).masked_fill(~packed(LENGTHS), -torch.inf)},
        {"position_ids": places, "attention_mask": every, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends},
    ]
    for how in given:
        close(model(ids, use_cache=False, **how).logits, alone)
    for cache in (tessera.Cache(f"sink:3 + window:{window} + tc", model), DynamicCache(config=model.config)):
        close(model(ids, past_key_values=cache, position_ids=places, attention_mask=packed(LENGTHS)).logits, alone)
    two = model(ids.expand(2, -1), use_cache=False, position_ids=torch.cat((positions((97,)), places)))
    close(two.logits[1:], alone)
    close(two.logits[:1], model(ids, use_cache=False).logits)


@torch.no_grad()
@pytest.mark.parametrize("spec", ["sink:3 + window:24", TC])
def test_a_cache_begins_anew_with_a_document_in_a_later_call(spec: str) -> None:
    model, first, second = model_for(spec), tokens(1, 40), tokens(1, 45)
    plain = make() if "tc" not in spec else model
    cache = tessera.Cache(spec, model)
    model(first, past_key_values=cache)
    mask = packed((40, 45))
    found = []
    for a, b in ((40, 70), (70, 71), (71, 85)):
        given = {"attention_mask": mask[:, :, a:b, :b], "position_ids": torch.arange(a - 40, b - 40)[None]}
        found.append(model(second[:, a - 40 : b - 40], past_key_values=cache, **given).logits)
    fresh = tessera.Cache(spec, plain)
    close(torch.cat(found, dim=1), plain(second, past_key_values=fresh).logits)
    with pytest.raises(ValueError, match="has dropped the document before this one"):
        cache.crop(-45)
    assert cache.get_seq_length() == 85


@torch.no_grad()
def test_learning_from_packed_rows_is_learning_from_each_document() -> None:
    model, ids = attached(), tokens(1, sum(LENGTHS))
    with torch.enable_grad():
        model(ids, use_cache=False, position_ids=positions(LENGTHS)).logits.square().sum().backward()
        wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        for part in ids.split(LENGTHS, 1):
            model(part, use_cache=False).logits.square().sum().backward()
    assert wanted
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert relative(p.grad, wanted[name]) < 1e-3, name


def vision(kind: str, **changes: Any) -> Any:
    """Make a small model whose image tokens attend to each other bidirectionally."""
    text = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        **changes,
    }
    eyes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    model_class = Gemma3ForConditionalGeneration if kind == "gemma3" else PaliGemmaForConditionalGeneration
    if kind == "gemma3":
        text |= {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16}
        more: dict[str, Any] = {"mm_tokens_per_image": 4, "image_token_index": 90}
    else:
        text |= {"model_type": "gemma"}
        more = {"image_token_index": 90, "projection_dim": 64}
        eyes |= {"projection_dim": 64, "num_image_tokens": 4}
    config = model_class.config_class(text_config=text, vision_config=eyes, **more)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = model_class(config).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(0, 0.1)
    return model


def seeing(model: Any, cache: Any, ids: Tensor, **more: Any) -> Tensor:
    given = {"pixel_values": torch.ones(1, 3, 28, 28), "token_type_ids": (ids == 90).long()}
    found: Tensor = model(input_ids=ids, past_key_values=cache, **given, **more).logits
    return found


def image_row(at: int, count: int) -> Tensor:
    ids = torch.randint(3, 80, (1, count))
    ids[0, at : at + 4] = 90
    return ids


@torch.no_grad()
def test_image_tokens_see_each_other_in_a_call_longer_than_the_sliding_window() -> None:
    model, ids = vision("gemma3"), image_row(20, 60)
    wanted = seeing(model, DynamicCache(config=model.config), ids)
    cache = tessera.Cache("dense", model)
    close(seeing(model, cache, ids), wanted)
    assert relative(seeing(model, tessera.Cache("sink:4 + q8_0 + recent:16", model), ids), wanted) < 0.02
    text = torch.randint(3, 80, (1, 9))
    other = DynamicCache(config=model.config)
    seeing(model, other, ids)
    close(model(text, past_key_values=cache).logits, model(text, past_key_values=other).logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gemma3", "paligemma"])
@pytest.mark.parametrize("spec", [None, "transformers", "sink:3 + window:64 + tc"])
def test_two_way_spans_stay_two_way_with_a_memory_behind_a_long_window(kind: str, spec: str | None) -> None:
    model, ids = vision(kind), image_row(20 if kind == "gemma3" else 0, 60)
    wanted = seeing(model, None, ids, use_cache=False)
    tessera.attach(model, TensorCacheConfig(window=64, sink=3))
    cache = None if spec is None else cache_for(spec, model)
    close(seeing(model, cache, ids, use_cache=spec is not None), wanted)


@torch.no_grad()
def test_calls_with_and_without_a_cache_agree_on_two_way_spans_beyond_the_window() -> None:
    model, ids = vision("gemma3"), image_row(30, 90)
    tessera.attach(model, TensorCacheConfig(window=16, sink=3))
    for name, p in model.named_parameters():
        if "tensor_cache.out" in name:
            p.normal_(0, 0.3)
    whole = seeing(model, None, ids, use_cache=False)
    close(seeing(model, tessera.Cache("sink:3 + window:16 + tc", model), ids), whole)
    close(seeing(model, DynamicCache(config=model.config), ids), whole)


@torch.no_grad()
@pytest.mark.parametrize("spec", SPECS)
def test_a_bidirectional_prefix_is_bidirectional_through_every_cache(spec: str) -> None:
    """A window limits only attention to earlier tokens."""
    model, ids = make(), tokens(1, 60)
    mask = torch.ones(60, 60, dtype=torch.bool).tril()
    mask[:12, :12] = True
    if "window" in spec:
        place = torch.arange(60)
        sink = 3 if "sink" in spec else 0
        seen = mask & ((place > place[:, None] - 24) | (place < sink))
    else:
        seen = mask
    wanted = make()(ids, attention_mask=seen[None, None], use_cache=False).logits
    found = model(ids, attention_mask=mask[None, None], past_key_values=tessera.Cache(spec, model)).logits
    close(found, wanted)


def padded_calls(model: Any, spec: str, ids: Tensor, mask: Tensor, cuts: tuple[int, ...]) -> Tensor:
    """Return the logits of all slots, with correct positions. mask: (rows, slots)."""
    cache, found, end = cache_for(spec, model), [], 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    for n in cuts:
        begin, end = end, end + n
        given = {"attention_mask": mask[:, :end], "position_ids": places[:, begin:end], "past_key_values": cache}
        found.append(model(ids[:, begin:end], **given).logits)
    return torch.cat(found, dim=1)


def rows_with_padding() -> Tensor:
    """Return a mask (4, 120): rows with padding on the left, right of the first turn, within a call, and none."""
    mask = torch.ones(4, 120, dtype=torch.long)
    mask[0, :13] = 0
    mask[1, 41:60] = 0
    mask[2, 70:85] = 0
    mask[2, 20:23] = 0
    return mask


@torch.no_grad()
@pytest.mark.parametrize("spec", [*SPECS, TC, "transformers"])
def test_padding_anywhere_is_as_if_it_were_not_there(spec: str) -> None:
    model = attached() if spec == "transformers" else model_for(spec)
    ids, mask = tokens(4, 120), rows_with_padding()
    near = 1e-5 if "hqmq" not in spec and "q4_0" not in spec else 2e-3
    for cuts in ((120,), (60, 60), (60, 1, 30, 1, 28)):
        found = padded_calls(model, spec, ids, mask, cuts)
        other = padded_calls(model, spec, torch.where(mask.bool(), ids, 5), mask, cuts)
        for row in range(4):
            real = mask[row].bool()
            assert torch.equal(found[row, real], other[row, real])
            ends = real.cumsum(0)[torch.tensor(cuts).cumsum(0) - 1].tolist()
            own = tuple(b - a for a, b in zip([0, *ends], ends, strict=False) if b > a)
            alone = padded_calls(model, spec, ids[row : row + 1, real], torch.ones(1, int(real.sum())), own)
            assert relative(found[row, real], alone[0]) < near, (row, cuts)


@torch.no_grad()
def test_padding_is_not_kept() -> None:
    model, mask = make(), rows_with_padding()
    cache = tessera.Cache("dense", model)
    model(tokens(4, 120), attention_mask=mask, past_key_values=cache)
    assert sum(cache.layers[0].held().values()) == int(mask.sum())


@torch.no_grad()
def test_rows_with_gaps_are_saved_copied_reordered_and_cropped(tmp_path: Path) -> None:
    for spec in ("dense", TC):
        model, ids, mask = model_for(spec), tokens(4, 140), torch.cat((rows_with_padding(), torch.ones(4, 20)), 1).long()
        places = (mask.cumsum(1) - 1).clamp(min=0)
        caches = [tessera.Cache(spec, model) for _ in range(3)]
        for cache in caches:
            model(ids[:, :70], attention_mask=mask[:, :70], position_ids=places[:, :70], past_key_values=cache)
            cache.activate_past_recording()
            model(ids[:, 70:110], attention_mask=mask[:, :110], position_ids=places[:, 70:110], past_key_values=cache)
            cache.crop(-20)
            model(ids[:, 90:120], attention_mask=mask[:, :120], position_ids=places[:, 90:120], past_key_values=cache)
        caches[1].save(tmp_path / "cache.safetensors")
        caches[1] = tessera.Cache.load(tmp_path / "cache.safetensors", model)
        order = torch.tensor([2, 0, 3, 1])
        caches[2].reorder_cache(order)
        rows = [torch.arange(4), torch.arange(4), order]
        wanted = padded_calls(model, spec, ids, mask, (140,))[:, 120:]
        for cache, row in zip(caches, rows, strict=True):
            given = {"attention_mask": mask[row], "position_ids": places[row, 120:]}
            close(model(ids[row, 120:], past_key_values=cache, **given).logits, wanted[row])


@torch.no_grad()
@pytest.mark.parametrize("spec", ["dense", TC])
def test_a_mask_buffer_that_is_written_anew_is_read_anew(spec: str) -> None:
    model = model_for(spec)
    ids, cache, buffer = tokens(1, 40), tessera.Cache(spec, model), torch.zeros(1, 1, 40, 40, dtype=torch.bool)
    for inference in (False, True):
        for pads in (0, 25, 3):
            with torch.inference_mode(inference), torch.no_grad():
                buffer = buffer.clone() if inference else buffer
                buffer.copy_(torch.ones(40, 40).tril().bool() & (torch.arange(40) >= pads))
                cache.reset()
                found = model(ids, attention_mask=buffer, past_key_values=cache).logits
                close(found[:, pads:], model(ids, attention_mask=buffer.clone(), use_cache=False).logits[:, pads:])


@torch.no_grad()
@pytest.mark.parametrize("cached", ["tessera", "transformers", None])
def test_a_mask_that_a_memory_cannot_follow_is_refused_and_nothing_is_lost(cached: str | None) -> None:
    model, ids = attached(), tokens(1, 80)
    hidden = torch.ones(80, 80, dtype=torch.bool).tril()
    hidden[60:, 10:15] = False  # long before the window
    across = packed((40, 40))[0, 0].clone()
    across[70:, :40] = True  # a question that sees all documents
    for mask, why in ((hidden, "hides tokens that have left the window"), (across, "mask shows")):
        cache = None if cached is None else cache_for(TC if cached == "tessera" else cached, model)
        with pytest.raises(ValueError, match=why):
            model(ids, attention_mask=mask[None, None], past_key_values=cache, use_cache=cached is not None)
        if cached == "tessera":
            close(model(ids, past_key_values=cache).logits, model(ids, use_cache=False).logits)


@torch.no_grad()
def test_padding_that_is_shown_later_is_refused() -> None:
    for spec in ("dense", "window:24", TC):
        model, ids = model_for(spec), tokens(1, 50)
        cache = tessera.Cache(spec, model)
        mask = torch.ones(1, 50, dtype=torch.long)
        mask[:, 30:40] = 0
        model(ids[:, :40], attention_mask=mask[:, :40], past_key_values=cache)
        shown = torch.ones(1, 1, 10, 50, dtype=torch.bool).tril(40)
        with pytest.raises(ValueError, match="shows tokens that this cache no longer has"):
            model(ids[:, 40:], attention_mask=shown, past_key_values=cache)
        assert cache.get_seq_length() == 40
        model(ids[:, 40:], attention_mask=mask, past_key_values=cache)


@torch.no_grad()
def test_packed_documents_by_length_need_no_cache() -> None:
    model, ids = attached(), tokens(1, 20)
    ends = torch.tensor([0, 8, 20])
    with pytest.raises(ValueError, match="are for calls without a cache"):
        model(ids, cu_seq_lens_q=ends, past_key_values=tessera.Cache("dense", model))
    with pytest.raises(ValueError, match="must end at the tokens of one row"):
        model(ids.expand(2, -1), cu_seq_lens_q=ends, use_cache=False)


# Positions


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gap", "restart", "backwards", "rows"])
@pytest.mark.parametrize("rotary", [False, True])
def test_cached_uncached_and_streamed_reads_agree_for_any_positions(kind: str, rotary: bool) -> None:
    model = attached(config=TensorCacheConfig(**{**MEMORY.to_dict(), "rotary": rotary}))
    ids, place = tokens(2, 90), torch.arange(90)
    where = {
        "gap": torch.where(place < 37, place, place + 200),
        "restart": torch.where(place < 37, place, place - 37),
        "backwards": 300 - place,
        "rows": torch.stack((place * 2, torch.where(place < 50, place + 9, place + 77))),
    }[kind]
    where = where.expand(2, -1)
    mask = torch.ones_like(ids)
    whole = model(ids, position_ids=where, attention_mask=mask, use_cache=False).logits
    for make_cache in (lambda: tessera.Cache(TC, model), lambda: DynamicCache(config=model.config)):
        for cuts in ((90,), (30, 60), (50, 1, 1, 38)):
            cache, found, end = make_cache(), [], 0
            for n in cuts:
                begin, end = end, end + n
                given = {"position_ids": where[:, begin:end], "attention_mask": mask[:, :end]}
                found.append(model(ids[:, begin:end], past_key_values=cache, **given).logits)
            close(torch.cat(found, dim=1), whole)


@torch.no_grad()
def test_what_is_known_of_a_cache_of_transformers_follows_its_rows_and_its_length() -> None:
    model, ids = attached(), tokens(2, 80)
    where = torch.stack((torch.arange(80) * 2, torch.arange(80) + 50))
    order = torch.tensor([1, 0, 1])
    wanted = model(ids[order], position_ids=where[order], attention_mask=torch.ones(3, 80), use_cache=False).logits
    cache = DynamicCache(config=model.config)
    model(ids[:, :60], position_ids=where[:, :60], past_key_values=cache)
    cache.crop(-20)
    cache.batch_select_indices(order)
    close(model(ids[order, 40:], position_ids=where[order, 40:], past_key_values=cache).logits, wanted[:, 40:])
    cache.batch_repeat_interleave(2)
    twice = order.repeat_interleave(2)
    more = model(ids[twice, :5], position_ids=where[twice, :5] + 200, past_key_values=cache).logits
    close(more[::2], more[1::2])


@torch.no_grad()
def test_a_cache_that_was_filled_without_the_memory_is_refused() -> None:
    model, ids = make(), tokens(1, 40)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    tessera.attach(model, MEMORY)
    with pytest.raises(ValueError, match="was filled without the memory"):
        model(ids[:, :1], past_key_values=cache)


# Reading masks


@st.composite
def masks(draw: st.DrawFn) -> tuple[list[int], list[bool]]:
    """Draw the document of each slot, and whether it is padding."""
    count = draw(st.integers(1, 12))
    begins = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    pads = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    number, numbers = 0, []
    for begin in begins:
        number += begin
        numbers.append(number)
    return numbers, pads


@settings(max_examples=100, deadline=None)
@given(drawn=masks(), cut=st.integers(0, 11))
def test_documents_and_padding_are_read_from_the_mask_whole_and_in_parts(drawn: tuple[list[int], list[bool]], cut: int) -> None:
    numbers, pads = torch.tensor(drawn[0]), torch.tensor(drawn[1])
    count = len(numbers)
    seen = ((numbers[:, None] == numbers) & ~pads & torch.ones(count, count, dtype=torch.bool).tril())[None, None]
    real = (~pads).nonzero().flatten().tolist()
    begins = [slot for slot in real if not any(numbers[other] == numbers[slot] for other in real if other < slot)]
    said = read_mask(seen, np.zeros((1, 0), dtype=np.bool_), Rule(), None)
    if said is None:
        assert not pads.any()
        assert begins == [0]
    else:
        assert list(said.real[0]) == [int(not pad) for pad in pads]
        assert said.begins[0] == begins
        assert said.plain == [len(begins) < 2]
    query = torch.zeros(1, 1, count, 4)
    limits = SlidingWindow(4, 1)
    of = read_documents(seen, query, count, limits).of
    for slot in range(count):
        if slot in real:
            assert of.number[0, slot] == sum(begin <= slot for begin in begins) - 1
            assert of.place[0, slot] == sum(other < slot and numbers[other] == numbers[slot] for other in real)
        else:
            assert of.number[0, slot] == -1
    cut = min(cut, count)
    if cut:
        before = read_documents(seen[:, :, :cut, :cut], query[:, :, :cut], cut, limits).of
        parts = read_documents(seen[:, :, cut:], query[:, :, cut:], count, limits, before).of if cut < count else before
        assert parts.same(of)
        assert (parts.place[:, real] == of.place[:, real]).all()


@settings(max_examples=200, deadline=None)
@given(
    pads=st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 11), max_size=2, unique=True),
    window=st.integers(1, 5),
    sink=st.integers(0, 3),
)
def test_a_padding_mask_has_the_documents_of_its_square_mask(
    pads: list[list[bool]], cuts: list[int], window: int, sink: int
) -> None:
    """What queries see within a window and sinks is equal, too; each call continues from those before."""
    real, limits = ~torch.tensor(pads), SlidingWindow(window, sink)
    rows, start = len(pads), 0
    before: list[Any] = [None, None, None]
    for end in [*sorted(cuts), 12]:
        n = end - start
        made = mask_unless_causal(rows, n, end, start, attention_mask=real[:, :end])
        assert isinstance(made, PaddingMask)
        few = made.whole.clone()
        query, found = torch.zeros(rows, 1, n, 4), []
        with pytest.MonkeyPatch.context() as patch:
            for number, mask in enumerate((made, few, few.expand(-1, 2, -1, -1))):
                patch.setattr("tessera.attention.read_masks.FEW", 0 if number == 2 else 1 << 20)
                found.append(read_documents(mask, query, end, limits, before[number], memory=True))
        for said in found:
            assert said.of.same(found[0].of)
            seen = torch.zeros(rows, n, end, dtype=torch.bool)
            for number, first in enumerate(range(0, n, window)):
                columns, shown = said.block(limits, query.device, number)
                asks = torch.as_tensor(said.of.number)[:, start + first : start + first + window, None] >= 0
                seen[:, first : first + window, columns] = shown[:, 0] & asks
            place, real_query = torch.as_tensor(said.of.place), torch.as_tensor(said.of.number)[:, start:, None] >= 0
            near = (place[:, None] > place[:, start:, None] - window) | (place[:, None] < sink)
            assert torch.equal(seen, few[:, 0] & near & real_query)
        before, start = [said.of for said in found], end


@settings(max_examples=200, deadline=None)
@given(st.lists(st.booleans(), max_size=20), st.lists(st.booleans(), max_size=20), st.integers(0, 40), st.integers(0, 40))
def test_runs_are_the_slots_that_they_stand_for(first: list[bool], later: list[bool], a: int, b: int) -> None:
    runs = Runs.marked(bytes(first)).joined(Runs.marked(bytes(later)), len(first))
    slots = [i for i, one in enumerate([*first, *later]) if one]

    def listed(runs: Runs) -> list[int]:
        return [slot + i for slot, size in runs.runs for i in range(size)]

    assert listed(runs) == slots
    assert runs.count == len(slots)
    assert listed(runs.cut(a, b)) == slots[a:b]
    assert runs.before(a) == sum(slot < a for slot in slots)
    assert listed(runs.between(a, b)) == [slot for slot in range(a, b) if slot not in slots]
    if slots:
        assert runs.index(torch.device("cpu")).tolist() == slots
        assert runs.of(torch.arange(41), 0, 0).tolist() == slots


RULES = [Rule(), Rule(sliding=3), Rule(sliding=7), Rule(by_document=True), Rule(memory=(4, 2)), Rule(None, True, (5, 1))]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_padding_mask_is_read_like_the_square_mask_made_from_it(rule: Rule) -> None:
    """This includes masks that show slots which rows do not have, or hide slots that they have."""
    seen = set()
    for number in range(300):
        rows, past, n = int(torch.randint(1, 4, ())), int(torch.randint(0, 9, ())), int(torch.randint(1, 9, ()))
        padding = torch.rand(rows, past + n) < (0.5, 0.9, 1.0)[number % 3]
        known = padding[:, :past] ^ (torch.rand(rows, past) < (0.0, 0.1)[number // 3 % 2])
        column = torch.arange(past + n)
        shown = column <= column[past:, None]
        if rule.sliding is not None:
            shown &= column > column[past:, None] - rule.sliding
        whole = padding[:, None, None] & shown
        short = PaddingMask((rows, 1, n, past + n), whole.device, HostCopy(padding), rule.sliding, lambda whole=whole: whole)
        said, wanted = (read_mask(mask, known.numpy(), rule, None) for mask in (short, whole))
        assert said == wanted
        seen |= set() if said is None else {name for name in ("plain", "strange", "absorbed") if any(getattr(said, name))}
    assert seen >= {"plain", "strange", *(["absorbed"] if rule.memory else [])}


def test_a_mask_of_padding_is_the_mask_itself_to_whatever_else_touches_it() -> None:
    whole = torch.rand(2, 1, 3, 5) < 0.5
    mask = PaddingMask((2, 1, 3, 5), whole.device, None, None, lambda: whole)
    assert "PaddingMask" in repr(mask)
    assert torch.equal(mask, whole)
    assert torch.equal(torch.where(mask, 1, 0), whole.long())
    assert torch.equal(mask[:, :, 1:], whole[:, :, 1:])
    assert mask.tolist() == mask.numpy().tolist() == whole.tolist()
    for other in (copy.deepcopy(mask), copy.copy(mask), pickle.loads(pickle.dumps(mask))):
        assert torch.equal(other, whole)
    assert torch.equal(mask.float(), whole.float())
    assert bool(mask.any()) == bool(whole.any())
    assert mask.to("meta").shape == whole.shape


@torch.no_grad()
@pytest.mark.parametrize("padded", [0, 5])
@pytest.mark.parametrize("spec", ["", "dense", "sink:4 + hqmq:4 + recent:16"])
def test_a_mask_that_was_written_to_hides_what_was_written(padded: int, spec: str) -> None:
    model, ids, padding = tessera.enable(make()), tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    padding[0, :padded] = 0
    lower = torch.ones(20, 20, dtype=torch.bool).tril()
    wanted = lower & padding.bool()[:, None, None]
    masks = [create_causal_mask(model.config, model.get_input_embeddings()(ids), padding, past_key_values=None) for _ in "ab"]
    assert all(isinstance(mask, PaddingMask) for mask in masks)
    wanted[:, :, 10:, 7] = masks[0][:, :, 10:, 7] = False
    masks[1].select(3, 7)[:, :, 10:] = False
    logits = []
    for mask in (wanted, *masks):
        cache = {"past_key_values": tessera.Cache(spec, model)} if spec else {"use_cache": False}
        logits.append(model(ids, attention_mask=mask, **cache).logits[:, padded:])
    assert relative(model(ids, attention_mask=padding).logits[:, padded:], logits[0]) > 0.01
    for found in logits[1:]:
        close(found, logits[0])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_layers_that_are_compiled_by_themselves_take_the_mask_into_one_graph(family: str) -> None:
    model, compiled = tessera.enable(make(family)), tessera.enable(make(family))
    compiled.load_state_dict(model.state_dict())
    torch.compiler.reset()
    for layer in compiled.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    for length in (20, 20, 17):
        ids, padding = tokens(2, length), torch.ones(2, length, dtype=torch.long)
        padding[0, : length - 15] = 0
        found, wanted = (each(ids, attention_mask=padding, use_cache=False).logits for each in (compiled, model))
        close(found[:, 5:], wanted[:, 5:])
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_static_cache_may_be_filled_to_its_last_slot(family: str) -> None:
    plain, switched = make(family), tessera.enable(make(family))
    switched.load_state_dict(plain.state_dict())
    ids, padding = tokens(2, 50), torch.ones(2, 50, dtype=torch.long)
    padding[0, :7] = padding[1, 20:23] = 0
    caches = [StaticCache(config=model.config, max_cache_len=50) for model in (plain, switched)]
    for begin, end in ((0, 30), (30, 31), (31, 40), (40, 50)):
        given = {"input_ids": ids[:, begin:end], "attention_mask": padding[:, :end]}
        pairs = zip((plain, switched), caches, strict=True)
        wanted, found = (model(**given, past_key_values=cache).logits for model, cache in pairs)
        real = padding[:, begin:end].bool()
        close(found[real], wanted[real])


def test_a_mask_made_late_is_that_of_its_call() -> None:
    """Some caches count in a tensor, whose value has changed by the time a layer makes the mask."""
    place, slots = torch.tensor(30), torch.tensor(34)
    options = {"mask_function": sliding_window_causal_mask_function(8), "local_size": 8}
    padded = torch.ones((1, 34), dtype=torch.bool)
    late = mask_unless_causal(1, 4, slots, place, torch.tensor(0), attention_mask=padded, **options)
    place += 4
    slots += 4
    assert isinstance(late, PaddingMask)
    assert torch.equal(late.whole, sdpa_mask(1, 4, 34, 30, 0, attention_mask=padded, allow_is_causal_skip=False, **options))
