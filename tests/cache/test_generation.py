"""All modes of `generate` give the results of transformers' own cache and of the model without a cache."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cache_fixtures import GROUPED
from cache_models import logits, make, padding, relative, tokens
from torch import Tensor
from transformers import DynamicCache

import tessera
from tessera.attention import over_tiers as tiers
from tessera.cache_layers.group import RECORDED, SequenceGroup, StepContext
from tessera.kernels import CompressedKV, cpu, reference
from tessera.kernels.cpu import sources
from versions import DRAFTS_WITH_WINDOWS, EARLY_EXIT_WITH_WINDOWS

PACKED = "sink:4 + hqmq:4 + recent:16"
#: Dense results are equal up to rounding.
CLOSE = {"atol": 2e-5, "rtol": 1e-5}
#: Maximum relative error of packing at 4 bits; the largest measured is 0.09.
NEAR = 0.2


@dataclass(frozen=True)
class Call:
    """A call of `generate`: its arguments, and the rows, tokens and padding of its prompt."""

    arguments: dict[str, Any] = field(default_factory=dict)
    rows: int = 2
    prompt: int = 150
    pads: tuple[int, ...] = ()
    draft: bool = False

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Return tokens and attention mask."""
        mask = padding(self.pads or (0,) * self.rows, self.prompt)
        return tokens(self.rows, self.prompt) * mask, mask


_SAMPLE = {"do_sample": True, "temperature": 0.8, "top_k": 30}
CALLS = {
    "greedy": Call(),
    "one row": Call(rows=1),
    "sampling": Call(_SAMPLE),
    "several samples": Call({**_SAMPLE, "num_return_sequences": 3}),
    "beams": Call({"num_beams": 3}),
    "several beams": Call({"num_beams": 4, "num_return_sequences": 3}),
    "sampled beams": Call({**_SAMPLE, "num_beams": 3}),
    "left padding": Call(rows=4, pads=(0, 3, 70, 149)),
    "beams with left padding": Call({"num_beams": 3}, rows=3, pads=(12, 0, 12)),
    "chunked prefill": Call({"prefill_chunk_size": 40}),
    "chunked prefill with left padding": Call({"prefill_chunk_size": 40}, rows=3, pads=(0, 30, 95)),
    "prompt shorter than the sinks": Call(prompt=2),
    "prompt of one token": Call(prompt=1),
    "prompt lookup": Call({"prompt_lookup_num_tokens": 6}, rows=1),
    "prompt lookup, sampled": Call({"prompt_lookup_num_tokens": 6, **_SAMPLE}, rows=1),
    "draft model": Call(rows=1, draft=True),
    "draft model, sampled": Call(_SAMPLE, rows=1, draft=True),
    "early exit": Call({"assistant_early_exit": 1}, rows=1),
}
_OLDER = {
    "draft model": DRAFTS_WITH_WINDOWS,
    "draft model, sampled": DRAFTS_WITH_WINDOWS,
    "early exit": EARLY_EXIT_WITH_WINDOWS,
}
#: Every call with and without sliding windows.
FAMILY_CALLS = [
    *((name, "llama") for name in CALLS),
    *(pytest.param(name, "gemma3", marks=_OLDER.get(name, ())) for name in CALLS),
]


def draft_of(model: Any) -> Any:
    """Make a draft model that often, but not always, agrees with `model`."""
    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in draft.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return draft


def run(model: Any, cache: Any, inputs: tuple[Tensor, Tensor], new: int = 80, **arguments: Any) -> Any:
    """Return the result of `generate`, with logits; sampling has the same seed every time."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return model.generate(
            inputs[0],
            attention_mask=inputs[1],
            past_key_values=cache,
            max_new_tokens=new,
            return_dict_in_generate=True,
            output_logits=True,
            output_scores=True,
            **arguments,
        )


def step_logits(output: Any) -> Tensor:
    """Return the logits from which each returned sequence was chosen, (steps, sequences, vocabulary)."""
    found = torch.stack(output.logits)
    beams = getattr(output, "beam_indices", None)
    if beams is None:
        return found
    beams = beams[:, : len(found)].T
    return found.gather(1, beams[..., None].expand(-1, -1, found.shape[-1]))


@torch.no_grad()
def taught(model: Any, sequences: Tensor, mask: Tensor) -> Tensor:
    """Return the model's logits without a cache for all tokens of `sequences` after the prompt, whose mask is `mask`."""
    mask = mask.repeat_interleave(len(sequences) // len(mask), 0)
    mask = torch.nn.functional.pad(mask, (0, sequences.shape[1] - mask.shape[1]), value=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(sequences, attention_mask=mask, position_ids=positions, use_cache=False).logits.transpose(0, 1)


@pytest.mark.parametrize(("name", "family"), FAMILY_CALLS)
def test_dense_generates_what_transformers_does(name: str, family: str) -> None:
    call, model = CALLS[name], make(family)
    arguments = call.arguments | ({"assistant_model": draft_of(model)} if call.draft else {})
    inputs = call.inputs()
    expected = run(model, DynamicCache(config=model.config), inputs, **arguments)
    cache = tessera.Cache("dense", model)
    found = run(model, cache, inputs, **arguments)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), **CLOSE)
    assert found.past_key_values is cache
    assert cache.get_seq_length() == expected.past_key_values.get_seq_length()


def distance(model: Any, output: Any, mask: Tensor) -> float:
    """Return the relative error of the logits of `output` against the model without a cache."""
    logits = step_logits(output)
    return relative(logits, taught(model, output.sequences, mask)[-1 - len(logits) : -1])


@pytest.mark.parametrize(("name", "family"), FAMILY_CALLS)
def test_packed_generation_stays_close_to_the_model_without_a_cache(name: str, family: str) -> None:
    call, model = CALLS[name], make(family)
    arguments = call.arguments | ({"assistant_model": draft_of(model)} if call.draft else {})
    inputs = call.inputs()
    cache = tessera.Cache(PACKED, model)
    found = run(model, cache, inputs, new=100, **arguments)
    assert distance(model, found, inputs[1]) < NEAR
    assert cache.report().tiers["hqmq:4"] > 0


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("codec", ["hqmq:k4v3.5", "(k=q8_0,v=hqmq:4)", "(k=hqmq:4,v=hqmq:s192_r6_med3)"])
def test_generation_with_codecs_of_keys_and_of_values_stays_close(codec: str, family: str) -> None:
    """Kernels run where they are built and support both codecs."""
    model = make(family)
    inputs = Call(rows=3, pads=(0, 3, 70)).inputs()
    cache = tessera.Cache(f"sink:4 + {codec}@192 + recent:16", model)
    with pytest.MonkeyPatch.context() as patch:
        if not codec.startswith("(k=q8_0") and cpu.MISSING is None:
            patch.setattr(reference, "attend", lambda *_, **__: pytest.fail("the definition ran"))
        found = run(model, cache, inputs, new=100)
    assert distance(model, found, inputs[1]) < NEAR
    assert cache.report().tiers[codec] > 0


@contextmanager
def watched(cache: tessera.Cache, name: str) -> Iterator[list[tuple[Any, ...]]]:
    """Record the arguments of every call of a method of `cache`."""
    seen: list[tuple[Any, ...]] = []
    method = getattr(cache, name)
    setattr(cache, name, lambda *args, **kwargs: (seen.append(args), method(*args, **kwargs))[1])
    yield seen
    delattr(cache, name)


@pytest.mark.parametrize("spec", ["dense", PACKED])
@pytest.mark.parametrize("name", ["prompt lookup", "draft model"])
def test_assisted_generation_keeps_some_drafts_and_takes_others_back(name: str, spec: str) -> None:
    """The tokens are also those of plain greedy generation."""
    model, call = make(), CALLS[name]
    inputs = call.inputs()
    arguments = call.arguments | ({"assistant_model": draft_of(model)} if call.draft else {})
    cache = tessera.Cache(spec, model)
    with watched(cache, "crop") as crops, watched(cache, "update") as updates:
        found = run(model, cache, inputs, **arguments)
    assert any(removed < 0 for (removed,) in crops)
    assert len(updates) // len(cache.layers) < 80
    if spec == "dense":
        plain = run(model, tessera.Cache(spec, model), inputs)
        assert torch.equal(found.sequences, plain.sequences)


@pytest.mark.parametrize("spec", ["dense", PACKED])
@pytest.mark.parametrize("gaps", [False, True], ids=["no gaps", "padding between the turns"])
@pytest.mark.parametrize("name", ["greedy", "left padding", "prompt of one token", "prompt lookup"])
def test_a_second_prompt_goes_on_with_the_same_cache(name: str, gaps: bool, spec: str) -> None:
    """The first turn generates as `name` says, the second greedily."""
    model, call = make(), CALLS[name]
    ids, mask = call.inputs()
    more = tokens(call.rows, 70)
    more_mask = torch.ones_like(more)
    if gaps:
        more_mask[0, :33] = 0
    caches = [tessera.Cache(spec, model), *([DynamicCache(config=model.config)] if spec == "dense" else [])]
    results = []
    for cache in caches:
        first = run(model, cache, (ids, mask), **call.arguments).sequences
        answer = torch.ones_like(first[:, ids.shape[1] :])
        both = torch.cat([first, more], 1), torch.cat([mask, answer, more_mask], 1)
        results.append(run(model, cache, both))
    if spec == "dense":
        assert torch.equal(results[1].sequences, results[0].sequences)
        torch.testing.assert_close(torch.stack(results[1].logits), torch.stack(results[0].logits), **CLOSE)
    else:
        assert distance(model, results[0], both[1]) < NEAR


@pytest.mark.parametrize("spec", ["dense", PACKED, "sink:4 + window:60"])
def test_copies_of_a_prompts_cache_go_separate_ways(spec: str) -> None:
    model = make()
    prompt, one, other = tokens(2, 150), tokens(2, 90), tokens(2, 20)
    cache = tessera.Cache(spec, model)
    logits(model, cache, prompt, (150,))

    def go_on(with_: Tensor) -> tuple[Tensor, tessera.Cache]:
        copied = copy.deepcopy(cache)
        return logits(model, copied, with_, (with_.shape[1],)), copied

    before, _ = go_on(one)
    _, copied = go_on(other)
    assert copied.get_seq_length() == 170
    assert cache.get_seq_length() == 150
    assert torch.equal(go_on(one)[0], before)


@pytest.mark.parametrize("taken", [1, 30, 100])
@pytest.mark.parametrize("spec", ["dense", PACKED, f"sink:4 + {GROUPED} + recent:16"])
def test_what_was_cropped_leaves_no_trace(spec: str, taken: int) -> None:
    """This includes packed tiers, except that the remaining tokens of a split block have been packed once."""
    model = make()
    ids, wrong, more = tokens(2, 200), tokens(2, taken), tokens(2, 50)
    plain, cropped = tessera.Cache(spec, model), tessera.Cache(spec, model)
    logits(model, plain, ids, (200,))
    logits(model, cropped, torch.cat([ids, wrong], 1), (200, taken))
    cropped.crop(-taken)
    assert cropped.get_seq_length() == 200
    expected, found = logits(model, plain, more, (50,)), logits(model, cropped, more, (50,))
    if spec == "dense":
        assert torch.equal(found, expected)
    else:
        assert relative(found, expected) < (0.02 if GROUPED in spec else NEAR)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("spec", [PACKED, "window:60", f"sink:4 + {GROUPED}@64 + recent:16"])
def test_what_was_recorded_and_cropped_leaves_no_trace_at_all(spec: str, family: str) -> None:
    model = make(family)
    ids, wrong, more = tokens(2, 200), tokens(2, 90), tokens(2, 50)
    plain, cropped = tessera.Cache(spec, model), tessera.Cache(spec, model)
    logits(model, plain, ids, (200,))
    logits(model, cropped, ids, (200,))
    for _ in range(3):
        cropped.activate_past_recording()
        logits(model, cropped, wrong, (40, 50))
        cropped.crop(-90)
    assert cropped.report() == plain.report()
    assert torch.equal(logits(model, cropped, more, (50,)), logits(model, plain, more, (50,)))


def test_recording_holds_back_no_more_than_it_says() -> None:
    model = make()
    cache = tessera.Cache(PACKED, model)
    cache.activate_past_recording()
    logits(model, cache, tokens(1, 1500), (700, 800))
    for layer in cache.layers:
        assert RECORDED <= layer.held()["recent"] < RECORDED + 16 + 64
    cache.crop(0)
    for layer in cache.layers:
        assert layer.held()["recent"] < 16 + 64


@pytest.mark.parametrize("spec", ["dense", PACKED])
def test_grad_modes_may_change_between_calls(spec: str) -> None:
    model = make()
    ids, cuts = tokens(2, 300), (100, 1, 1, 98, 1, 1, 98)
    expected = logits(model, tessera.Cache(spec, model), ids, cuts)
    cache, out = tessera.Cache(spec, model), []
    for number, part in enumerate(ids.split(list(cuts), 1)):
        with torch.no_grad() if number % 2 else torch.inference_mode():
            out.append(model(part, past_key_values=cache).logits)
    assert torch.equal(torch.cat(out, 1), expected)
    with torch.no_grad():
        cache.crop(-250)
        cache.reorder_cache(torch.tensor([1, 0]))
        again = model(ids[:, 50:100].flip(0), past_key_values=cache).logits.flip(0)
    assert relative(again, expected[:, 50:100]) < (1e-5 if spec == "dense" else NEAR)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_generate_within_a_grad_mode(mode: Any) -> None:
    model = make()
    inputs = Call().inputs()
    outside = run(model, tessera.Cache(PACKED, model), inputs)
    with mode():
        inside = run(model, tessera.Cache(PACKED, model), inputs)
    assert torch.equal(torch.stack(inside.logits), torch.stack(outside.logits))


@pytest.mark.parametrize("spec", ["dense", PACKED, "window:40"])
def test_after_a_reset_the_cache_is_as_new(spec: str) -> None:
    model = make()
    used = tessera.Cache(spec, model)
    run(model, used, CALLS["left padding"].inputs())
    used.reset()
    assert used.report().nbytes == used.get_seq_length() == 0
    inputs = Call(rows=3).inputs()
    found, expected = run(model, used, inputs), run(model, tessera.Cache(spec, model), inputs)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("spec", ["dense", PACKED])
def test_rows_can_be_repeated_selected_and_reordered(spec: str) -> None:
    model = make()
    ids, mask = Call(rows=4, prompt=250, pads=(0, 3, 70, 249)).inputs()
    changes = [
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2, 3, 3]),
        (lambda cache: cache.reorder_cache(torch.tensor([7, 0, 5, 2, 2, 1, 3, 6])), [3, 0, 2, 1, 1, 0, 1, 3]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1, 2, 7])), [0, 2, 3]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 3]),
    ]
    more = tokens(4, 10)
    longer = torch.nn.functional.pad(mask, (0, 10), value=1)

    caches = [tessera.Cache(spec, model), DynamicCache(config=model.config)]
    for cache in caches:
        logits(model, cache, ids, (250,), mask)
    for change, rows in changes:
        results = []
        for cache in caches:
            change(cache)
            results.append(logits(model, cache, more[rows], (10,), longer[rows]))
            cache.crop(-10)
        assert relative(*results) < (1e-5 if spec == "dense" else NEAR)


@pytest.fixture
def packed_reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Record (query tokens, tokens read from packed tiers) of every attention call."""
    reads: list[tuple[int, int]] = []
    attend, newest = tiers._attend, tiers._newest

    def watch_newest(q: Tensor, group: SequenceGroup, *args: Any) -> Tensor:
        reads.append((q.shape[2], sum(tier.tokens for tier in group.chain.quantized)))
        count = len(reads)
        found = newest(q, group, *args)
        del reads[count:]  # where no kernel runs, it goes on to the other function
        return found

    def watch(q: Tensor, step: StepContext, *args: Any) -> Tensor:
        reads.append((q.shape[2], sum(part.tokens for part in step.sources if isinstance(part.held, CompressedKV))))
        return attend(q, step, *args)

    monkeypatch.setattr(tiers, "_attend", watch)
    monkeypatch.setattr(tiers, "_newest", watch_newest)
    return reads


def test_steps_read_the_packed_tokens_as_they_are_packed(packed_reads: list[tuple[int, int]]) -> None:
    model = make()
    run(model, tessera.Cache(PACKED, model), Call(prompt=150).inputs(), new=100)
    layers = model.config.num_hidden_layers
    # The prompt packs 128 tokens; the step that makes the sequence 4 + 192 + 16 long packs another block, for later steps.
    assert packed_reads == [(150, 0)] * layers + [(1, 128)] * (layers * 62) + [(1, 192)] * (layers * 37)


@pytest.mark.skipif(cpu.MISSING is not None, reason=str(cpu.MISSING))
def test_steps_run_on_the_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    ran: list[int] = []
    real = sources.attend_newest

    def watch(q: Tensor, *args: Any, **options: Any) -> Tensor | None:
        found = real(q, *args, **options)
        ran.extend([] if found is None else [q.shape[2]])
        return found

    monkeypatch.setattr(sources, "attend_newest", watch)
    run(model, tessera.Cache(PACKED, model), Call(prompt=150).inputs(), new=20)
    # All but those at which a buffer grows.
    assert 16 * model.config.num_hidden_layers <= len(ran) <= 19 * model.config.num_hidden_layers
    assert set(ran) == {1}


def test_dense_never_reads_packed_tokens(packed_reads: list[tuple[int, int]]) -> None:
    model = make()
    run(model, tessera.Cache("dense", model), Call(prompt=150).inputs())
    assert packed_reads
    assert not any(packed for _, packed in packed_reads)


@pytest.mark.parametrize("role", [0, 1], ids=["keys", "values"])
def test_answers_depend_on_the_packed_bytes(role: int) -> None:
    model = make()
    cache = tessera.Cache(PACKED, model)
    logits(model, cache, tokens(1, 200), (200,))
    spoilt = copy.deepcopy(cache)
    for layer in spoilt.layers:
        (tier,) = layer.groups[0].chain.quantized
        for page in tier.pages:
            page[role].tensors["codes"].random_(0, 255)
    step = tokens(1, 1)
    good, bad = (logits(model, c, step, (1,)) for c in (cache, spoilt))
    assert relative(bad, good) > 0.1
