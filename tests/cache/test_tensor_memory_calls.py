"""Calls of a model with a Tensor Memory: masks, documents, threads and crops."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from cache_models import logits, make, padding, tokens
from test_attached_tensor_memory import CONFIG, NAMES, attached, excite, whole
from transformers import (
    DynamicCache,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    OPTConfig,
    OPTForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    StaticCache,
)

import tessera
from tessera.adapters import attached_memory
from tessera.cache_layers.layer_states import state_of
from tessera.cache_layers.stream import TENSOR_MEMORY, Stream
from tessera.tensor_memory import TensorMemoryConfig
from versions import DRAFTS_WITH_WINDOWS, LONG_DRAFTS

SPECS = [None, "dense", "sink:2 + window:200"]


def cache_of(model: Any, spec: str | None) -> Any:
    return DynamicCache(config=model.config.get_text_config()) if spec is None else tessera.Cache(spec, model)


def streams(cache: Any) -> list[Stream]:
    """Return the states of the Tensor Memory on the layers of a cache."""
    found = [state_of(layer, TENSOR_MEMORY) for layer in cache.layers]
    return [stream for stream in found if isinstance(stream, Stream)]


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found.float(), wanted, rtol=1e-3, atol=1e-3)


# Threads, and nested calls


@pytest.mark.parametrize("spec", SPECS)
def test_threads_that_share_a_model_generate_what_each_does_alone(spec: str | None) -> None:
    model = attached()
    prompts = [tokens(2, count) for count in (21, 34, 13, 27)]
    masks = [padding(pads, ids.shape[1]) for ids, pads in zip(prompts, ((0, 4), (9, 0), (0, 2), (3, 1)), strict=True)]

    def go(i: int) -> torch.Tensor:
        return model.generate(
            prompts[i], attention_mask=masks[i], past_key_values=cache_of(model, spec), max_new_tokens=12, do_sample=False
        )

    alone = [go(i) for i in range(4)]
    for _ in range(2):
        found: list[Any] = [None] * 4

        def keep(i: int, found: list[Any] = found) -> None:
            try:
                found[i] = go(i)
            except Exception as error:
                found[i] = error

        threads = [threading.Thread(target=keep, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(isinstance(each, torch.Tensor) for each in found), found
        assert all(torch.equal(each, own) for each, own in zip(found, alone, strict=True))


def test_a_call_within_a_layer_of_another_call_changes_neither() -> None:
    model, ids, other = attached(), tokens(2, 20), tokens(2, 20)
    mask, other_mask = padding((0, 6), 20), padding((11, 3), 20)
    call = lambda x, m: model(x, attention_mask=m, use_cache=False).logits  # noqa: E731
    with torch.no_grad():
        wanted, other_wanted = call(ids, mask), call(other, other_mask)
        inner: list[torch.Tensor] = []

        def again(*_: Any) -> None:
            if not inner:
                inner.append(torch.empty(0))
                inner[0] = call(other, other_mask)

        # After the layer's memory, before its result is added.
        hook = model.model.layers[0].mlp.register_forward_pre_hook(again)
        found = call(ids, mask)
        hook.remove()
    assert torch.equal(inner[0], other_wanted)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("where", ["mlp", "self_attn"])
def test_a_call_that_raises_leaves_nothing_behind(where: str) -> None:
    model, ids = attached(), tokens(2, 20)
    mask = padding((0, 6), 20)
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits

        def stop(*_: Any) -> None:
            raise RuntimeError("stopped")

        hook = getattr(model.model.layers[1], where).register_forward_pre_hook(stop)
        cache = DynamicCache(config=model.config)
        gone = weakref.ref(cache)
        with pytest.raises(RuntimeError, match="stopped"):
            model(ids, attention_mask=mask, past_key_values=cache)
        hook.remove()
        # A layer called alone must not see the mask or cache of the interrupted call.
        assert torch.equal(model(ids, use_cache=False).logits, wanted)
        del cache
        gc.collect()
        assert gone() is None


def test_a_cache_is_freed_at_once_when_nobody_has_it_any_more() -> None:
    model = attached()
    cache = DynamicCache(config=model.config)
    logits(model, cache, tokens(1, 8), (8,))
    gone = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert gone() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_a_compiled_model_without_a_cache_gives_what_it_gives_in_eager() -> None:
    model = attached(config=TensorMemoryConfig(channels=2, grid=(3, 3), chunk=2), num_hidden_layers=1)
    ids = tokens(2, 12)
    close(torch.compile(model, backend="eager")(ids, use_cache=False).logits, whole(model, ids))


# Masks


@pytest.mark.parametrize("spec", SPECS)
def test_padding_on_either_side_in_the_middle_and_between_calls_is_never_read(spec: str | None) -> None:
    model, ids = attached(config=TensorMemoryConfig(channels=4, grid=(3, 3, 3), chunk=3)), tokens(4, 60)
    mask = torch.ones(4, 60, dtype=torch.long)
    mask[0, :7] = 0
    mask[1, 20:30] = 0
    mask[2, 25:30] = mask[2, 30:34] = 0
    mask[3, 52:] = 0
    found = logits(model, cache_of(model, spec), ids, (30, 20, 1, 9), mask)
    for row in range(4):
        real = mask[row].bool()
        close(found[row : row + 1, real], whole(model, ids[row : row + 1, real]))


def square(mask: torch.Tensor, documents: torch.Tensor | None = None) -> torch.Tensor:
    """Return a mask (batch, 1, tokens, tokens), bool: causal, padding hidden, documents separated."""
    count = mask.shape[1]
    seen = torch.ones(count, count, dtype=torch.bool).tril() & mask.bool()[:, None]
    return (seen if documents is None else seen & (documents[:, :, None] == documents[:, None]))[:, None]


@torch.no_grad()
def test_a_square_mask_that_says_what_a_flat_one_does_is_honoured() -> None:
    model, ids = attached(), tokens(3, 40)
    mask = padding((0, 5, 9), 40)
    mask[0, 12:16] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    wanted = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    additive = torch.zeros(3, 1, 40, 40).masked_fill(~square(mask), torch.finfo(torch.float32).min)
    for form in (square(mask), additive, square(mask).expand(-1, 4, -1, -1)):
        found = model(ids, attention_mask=form, position_ids=positions, use_cache=False).logits
        close(found[mask.bool()], wanted[mask.bool()])
    cache = DynamicCache(config=model.config)
    parts = []
    for a, b in ((0, 25), (25, 26), (26, 40)):
        part = square(mask)[:, :, a:b, :b]
        parts.append(model(ids[:, a:b], attention_mask=part, position_ids=positions[:, a:b], past_key_values=cache).logits)
    close(torch.cat(parts, 1)[mask.bool()], wanted[mask.bool()])


@torch.no_grad()
def test_a_static_cache_that_generate_makes_goes_on_as_any_other() -> None:
    for family in ("llama", "gemma3", "mistral"):
        model, ids = attached(family, **({"sliding_window": 8} if family != "llama" else {})), tokens(2, 14)
        mask = padding((0, 5), 14)
        options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
        wanted = model.generate(ids, use_cache=False, **options)
        assert torch.equal(model.generate(ids, cache_implementation="static", **options), wanted), family
    cache = StaticCache(config=model.config, max_cache_len=32)
    logits(model, cache, ids, (9, 5))
    cache.reset()
    close(logits(model, cache, ids, (9, 5)), whole(model, ids))


@torch.no_grad()
def test_masks_that_say_more_than_padding_and_documents_are_refused() -> None:
    model, ids = attached(), tokens(2, 12)
    causal = square(torch.ones(2, 12))
    later = causal.clone()
    later[1, 0, 4:8, 4:8] = True
    with pytest.raises(ValueError, match=r"lets tokens see later ones.*leave token_type_ids out"):
        model(ids, attention_mask=later)
    holes = causal.clone()
    holes[0, 0, 9, 3] = False
    with pytest.raises(ValueError, match="hides more than padding and other documents"):
        model(ids, attention_mask=holes)
    heads = causal.repeat(1, 4, 1, 1)
    heads[0, 2, 9, 3] = False
    with pytest.raises(ValueError, match="differs between heads"):
        model(ids, attention_mask=heads)
    with pytest.raises(ValueError, match="adds a bias"):
        model(ids, attention_mask=torch.where(causal, torch.linspace(0, 1, 12), torch.finfo(torch.float32).min))
    with pytest.raises(ValueError, match=r"must be \(batch, tokens\).*\(2, 12, 12\)"):
        model(ids, attention_mask=causal[:, 0])
    with pytest.raises(ValueError, match=r"\(2, 9\) does not fit 12 tokens of 2 rows"):
        model(ids, attention_mask=torch.ones(2, 9))


@pytest.mark.parametrize("spec", [None, "dense"])
@torch.no_grad()
def test_a_mask_that_hides_what_has_been_read_is_refused_and_the_cache_goes_on(spec: str | None) -> None:
    model, ids = attached(), tokens(2, 30)
    mask = padding((0, 5), 30)
    cache = cache_of(model, spec)
    wanted = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), use_cache=False).logits[:, 20:]
    logits(model, cache, ids[:, :20], (20,), mask[:, :20])
    hidden = mask.clone()
    hidden[0, 3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, 20:]
    with pytest.raises(ValueError, match="a memory cannot forget what it has read"):
        model(ids[:, 20:], attention_mask=hidden, past_key_values=cache)
    with pytest.raises(ValueError, match=r"behind 20 of earlier calls: it must be \(2, 30\)"):
        model(ids[:, 20:], attention_mask=mask[:, 20:], past_key_values=cache)
    with pytest.raises(ValueError, match=r"pass the mask of all tokens, \(batch, 30\)"):
        model(ids[:, 20:], past_key_values=cache)
    close(model(ids[:, 20:], attention_mask=mask, position_ids=positions, past_key_values=cache).logits, wanted)


# Packed documents


def packed(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions and document numbers of one row."""
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return positions, torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


#: The attention of gpt-oss ignores positions and mixes packed documents without a mask.
@pytest.mark.parametrize("family", [name for name in NAMES if name != "gpt-oss"])
@torch.no_grad()
def test_packed_documents_are_each_what_they_are_alone(family: str) -> None:
    model = attached(family, TensorMemoryConfig(channels=4, grid=(3, 3, 3), chunk=3))
    lengths = (17, 1, 30, 4, 8)
    ids, (positions, _) = tokens(1, 60), packed(lengths)
    found = model(ids, position_ids=positions, use_cache=False).logits
    for part, alone in zip(found.split(lengths, 1), ids.split(lengths, 1), strict=True):
        close(part, whole(model, alone))


@torch.no_grad()
def test_rows_are_packed_each_in_its_own_way() -> None:
    model, ids = attached(), tokens(2, 24)
    lengths = ((10, 14), (3, 3, 18))
    positions = torch.cat([packed(each)[0] for each in lengths])
    found = model(ids, position_ids=positions, use_cache=False).logits
    for row, each in enumerate(lengths):
        for part, alone in zip(found[row : row + 1].split(each, 1), ids[row : row + 1].split(each, 1), strict=True):
            close(part, whole(model, alone))


@pytest.mark.parametrize("how", ["cu_seq_lens", "seq_idx", "mask"])
@torch.no_grad()
def test_documents_may_be_told_by_lengths_numbers_or_a_square_mask(how: str) -> None:
    model, lengths = attached(), (9, 20, 11)
    ids, (positions, numbers) = tokens(1, 40), packed(lengths)
    ends = torch.tensor([0, 9, 29, 40], dtype=torch.int32)
    said = {
        # The positions are consecutive, so that only the given mask separates the documents.
        "cu_seq_lens": {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 20, "max_length_k": 20},
        "seq_idx": {"seq_idx": numbers.int()},
        "mask": {"attention_mask": square(torch.ones(1, 40), numbers), "position_ids": positions},
    }[how]
    read: list[torch.Tensor] = []
    layer = model.tensor_memory["0"]
    hook = layer.register_forward_hook(lambda _, args, __: read.append(args[1]))
    found = model(ids, use_cache=False, **said).logits
    hook.remove()
    # Three documents, in rows of similar length.
    assert sorted(length for x in read for length in [x.shape[1]] * len(x)) == [11, 11, 20]
    if how == "mask":
        for part, alone in zip(found.split(lengths, 1), ids.split(lengths, 1), strict=True):
            close(part, whole(model, alone))
    with pytest.raises(ValueError, match="must divide the 40 tokens of one row"):
        model(ids, cu_seq_lens_q=ends[:-1], use_cache=False)
    with pytest.raises(ValueError, match="must divide the 40 tokens of one row"):
        model(ids.repeat(2, 1), cu_seq_lens_q=ends, use_cache=False)


def test_documents_learn_from_packed_rows_what_they_do_alone() -> None:
    model, lengths = attached(), (13, 7, 20)
    ids, (positions, _) = tokens(1, 40), packed(lengths)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    model(ids, position_ids=positions, use_cache=False).logits.square().sum().backward()
    found = {name: model.get_parameter(name).grad for name in names}
    model.zero_grad(set_to_none=True)
    for alone in ids.split(lengths, 1):
        model(alone, use_cache=False).logits.square().sum().backward()
    for name in names:
        torch.testing.assert_close(found[name], model.get_parameter(name).grad, rtol=1e-3, atol=1e-2, msg=name)


@pytest.mark.parametrize("given", [True, False])
@torch.no_grad()
def test_packed_documents_with_a_cache_are_refused(given: bool) -> None:
    model, ids = attached(), tokens(1, 20)
    cache = {"past_key_values": DynamicCache(config=model.config)} if given else {}
    with pytest.raises(ValueError, match=r"kept apart without a cache only: pass use_cache=False"):
        model(ids, position_ids=packed((8, 12))[0], **cache)
    with pytest.raises(ValueError, match=r"kept apart without a cache only: pass use_cache=False"):
        model(ids, seq_idx=packed((8, 12))[1], **cache)


# Models that make their decoder's mask themselves


def gemma3(**changes: Any) -> Any:
    text = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={
            **text,
            **{"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 24, "initializer_range": 0.1, "pad_token_id": 0},
            **{"layer_types": ["sliding_attention", "full_attention"], "eos_token_id": None, **changes},
        },
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=90,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Gemma3ForConditionalGeneration(config).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(0, 0.1)
    return excite(tessera.attach(model, CONFIG))


@torch.no_grad()
def test_text_of_a_vision_language_model_is_read_with_its_padding() -> None:
    model, ids = gemma3(), torch.randint(3, 80, (2, 40))
    mask = padding((0, 7), 40)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    close(found[:1], model(ids[:1], use_cache=False).logits)
    close(found[1:, 7:], model(ids[1:, 7:], use_cache=False).logits)
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, use_cache=False)
    assert (found[0] - tessera.detach(copy.deepcopy(model))(ids[:1]).logits[0]).abs().max() > 0.1
    for how in ({}, {"cache_implementation": "static"}, {"past_key_values": tessera.Cache("dense", model)}):
        assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, **how), wanted)


@torch.no_grad()
def test_images_of_a_vision_language_model_are_read_in_order_and_not_both_ways() -> None:
    model, ids = gemma3(), torch.randint(3, 80, (1, 40))
    ids[0, 12:16] = 90
    image = torch.randn(1, 3, 28, 28)
    wanted = model(input_ids=ids, pixel_values=image, use_cache=False).logits
    cache = DynamicCache(config=model.config.get_text_config())
    first = model(input_ids=ids[:, :30], pixel_values=image, past_key_values=cache).logits
    close(torch.cat((first, model(input_ids=ids[:, 30:], past_key_values=cache).logits), 1), wanted)
    with pytest.raises(ValueError, match=r"lets tokens see later ones.*leave token_type_ids out"):
        model(input_ids=ids, pixel_values=image, token_type_ids=(ids == 90).long())
    text = torch.randint(3, 80, (1, 20))
    close(model(text, token_type_ids=torch.zeros_like(text)).logits, model(text).logits)


def test_models_whose_tokens_a_memory_cannot_read_in_order_are_refused_when_attached() -> None:
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    opt = OPTForCausalLM(OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64))
    text = {**sizes, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16}
    both = Gemma3ForCausalLM(Gemma3TextConfig(**text, use_bidirectional_attention=True))
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 32,
    }
    config = PaliGemmaConfig(
        text_config={"model_type": "gemma", **text},
        vision_config={"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, **vision},
        image_token_index=90,
        projection_dim=32,
    )
    prefix = PaliGemmaForConditionalGeneration(config)
    for model, why in (
        (opt, "could not tell the rows apart"),
        (both, "tokens see later ones"),
        (prefix, "tokens see later ones"),
    ):
        with pytest.raises(ValueError, match=why):
            tessera.attach(model, CONFIG)
        assert attached_memory(model) is None
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# Crops


@LONG_DRAFTS
@pytest.mark.parametrize("spec", [None, "dense", "sink:4 + window:400"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_assisted_generation_is_plain_generation(spec: str | None, chunk: int) -> None:
    config = TensorMemoryConfig(channels=4, grid=(3, 3, 3), chunk=chunk)
    model, ids = attached(config=config), tokens(1, 70)
    assistant = make(num_hidden_layers=1)
    wanted = model.generate(ids, max_new_tokens=90, do_sample=False)
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False}
    # Long drafts, which are used in full, whatever the assistant's confidence.
    bold = make(num_hidden_layers=1)
    bold.generation_config.update(
        num_assistant_tokens=80, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0
    )
    for how in (
        {"assistant_model": assistant},
        {"assistant_model": attached(config=config)},
        {"assistant_model": bold, "max_new_tokens": 90},
        {"prompt_lookup_num_tokens": 6},
    ):
        found = model.generate(ids, past_key_values=cache_of(model, spec), **{**options, **how})
        assert torch.equal(found, wanted[:, : found.shape[1]]), how


@pytest.mark.parametrize("family", [pytest.param("gemma3", marks=DRAFTS_WITH_WINDOWS), "gpt-oss"])
def test_assisted_generation_of_models_with_sliding_layers_is_plain_generation(family: str) -> None:
    model, ids = attached(family), tokens(1, 60)
    wanted = model.generate(ids, max_new_tokens=30, do_sample=False, use_cache=False)
    for cache in (DynamicCache(config=model.config), tessera.Cache("dense", model)):
        found = model.generate(
            ids, past_key_values=cache, assistant_model=make(family, num_hidden_layers=2), max_new_tokens=30, do_sample=False
        )
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("spec", [None, "dense"])
@pytest.mark.parametrize("cuts", [(20,), (100,), (90, *(1,) * 30, 12, 3), (5, 3)])
@torch.no_grad()
def test_a_cropped_cache_goes_on_as_if_what_it_lost_had_never_been_read(spec: str | None, cuts: tuple[int, ...]) -> None:
    model = attached(config=TensorMemoryConfig(channels=4, grid=(3, 3, 3), chunk=3))
    total = sum(cuts)
    ids, mask = tokens(3, total + 8), padding((0, 4, 0), total + 8)
    mask[2, 2:4] = 0
    for remove in (1, 3, 5, 7, 15, min(total - 4, 40)):
        if remove >= total:
            continue
        cache = cache_of(model, spec)
        logits(model, cache, tokens(3, total), cuts, mask[:, :total].clone())
        # Twice, because the remainder of a part is cut again.
        cache.crop(-(remove // 2))
        cache.crop(-(remove - remove // 2))
        length = total - remove
        # The kept tokens must be unchanged; new tokens differ from the removed ones.
        wanted_cache = cache_of(model, spec)
        again = cache_of(model, spec)
        kept = tokens(3, length)
        logits(model, wanted_cache, kept, (length,), mask[:, :length])
        logits(model, again, torch.cat((kept, tokens(3, remove)), 1), cuts, mask[:, :total])
        again.crop(-remove)
        rows = torch.tensor([2, 0, 1, 1])
        for each in (wanted_cache, again):
            each.batch_select_indices(rows)
        new, columns = ids[rows][:, :8], torch.cat((mask[:, :length], torch.ones(3, 8, dtype=torch.long)), 1)[rows]
        close(logits(model, again, new, (1, 7), columns), logits(model, wanted_cache, new, (1, 7), columns))


@pytest.mark.parametrize("form", ["flat", "square"])
@torch.no_grad()
def test_a_crop_is_correct_after_the_mask_buffer_of_its_call_was_overwritten(form: str) -> None:
    model, ids, mask = attached(), tokens(2, 20), padding((0, 4), 20).bool()
    found = []
    for written in (False, True):
        cache = cache_of(model, "dense")
        given = mask.clone() if form == "flat" else square(mask)
        model(ids[:, :12], attention_mask=given[..., :12] if form == "flat" else given[:, :, :12, :12], past_key_values=cache)
        if written:
            given.zero_()
        cache.crop(-5)
        given = torch.cat((mask[:, :7], mask[:, 12:]), dim=1)
        found.append(model(ids[:, 12:], attention_mask=given, past_key_values=cache).logits)
    assert torch.equal(*found)


@torch.no_grad()
def test_a_crop_that_goes_back_too_far_is_refused_and_changes_nothing() -> None:
    model, ids = attached(), tokens(1, 300)
    cache = DynamicCache(config=model.config)
    logits(model, cache, ids[:, :290], (289, 1))
    with pytest.raises(
        ValueError, match=r"from 290 to 190 tokens.*call cache\.activate_past_recording\(\) after its first call"
    ):
        cache.crop(-100)
    assert cache.get_seq_length() == 290
    close(logits(model, cache, ids[:, 290:], (10,)), whole(model, ids)[:, 290:])
    cache = DynamicCache(config=model.config)
    logits(model, cache, ids[:, :10], (10,))
    cache.activate_past_recording()
    logits(model, cache, tokens(1, 280), (200, 80))
    cache.crop(-270)
    logits(model, cache, ids[:, 10:200], (190,))
    # An empty stream is a new beginning.
    cache.crop(-cache.get_seq_length())
    close(logits(model, cache, ids, (300,)), whole(model, ids))


def test_what_gradients_are_kept_of_is_not_taken_back() -> None:
    model = attached()
    cache = DynamicCache(config=model.config)
    model(tokens(1, 20), past_key_values=cache)
    with pytest.raises(ValueError, match="in gradient mode not at all"):
        cache.crop(-2)


@torch.no_grad()
def test_what_is_kept_to_be_taken_back_is_bounded() -> None:
    from tessera.cache_layers.stream import BACK, STRIDE

    model = attached()
    cache = tessera.Cache("sink:4 + window:16", model)
    logits(model, cache, tokens(1, 500), (200, *(1,) * 300))
    for stream in streams(cache):
        assert BACK <= sum(read.x.shape[1] for read in stream.log) <= BACK + STRIDE
        assert len(stream.log) <= BACK // STRIDE + 1


@pytest.mark.parametrize("spec", [None, "dense"])
@torch.no_grad()
def test_a_cache_that_is_reset_begins_anew_with_other_padding(spec: str | None) -> None:
    model, ids = attached(), tokens(2, 20)
    cache = cache_of(model, spec)
    logits(model, cache, ids, (15, 5), padding((0, 6), 20))
    cache.reset()
    found = logits(model, cache, ids, (12, 8), padding((3, 0), 20))
    close(found[:1, 3:], whole(model, ids[:1, 3:]))
    close(found[1:], whole(model, ids[1:]))


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
@torch.no_grad()
def test_the_state_is_float32_in_half_precision(dtype: torch.dtype, autocast: bool) -> None:
    model, ids = attached(dtype=torch.float32 if autocast else dtype), tokens(2, 30)
    cache = DynamicCache(config=model.config)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        model(ids[:, :20], past_key_values=cache)
        model(ids[:, 20:], past_key_values=cache)
        found = model(ids, use_cache=False).logits
    assert found.dtype == dtype
    for stream in streams(cache):
        for _, state in stream.groups:
            assert {tensor.dtype for tensor in state.tensors().values()} == {torch.float32}
