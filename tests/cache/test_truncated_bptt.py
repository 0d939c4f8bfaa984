"""Segments with a persistent state equal one long sequence, forward and backward; if detached, forward only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

import tessera
from tessera.cache_layers.truncated_bptt import TruncatedBPTTCache
from tessera.lab.models.small_gpt import GPT, GPTConfig
from tessera.tensor_cache import TensorCacheConfig

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
SPECS = ("window:8", "sink:3 + window:8", "infini:8", "window:8 + tc", "sink:3 + window:8 + tc", "sink:3 + window:1 + tc")
MEMORIES: tuple[dict[str, Any], ...] = (
    {"rule": "outer", "rotary": True, "order": "read_first"},
    {"rates": "token", "gate": "token", "slow": (0.9, 0.5), "normalise_read": True, "rule": "outer"},
    {"slots": 3, "top_k": 2},
)
#: Lengths of segments of 60 tokens: shorter than the sinks, than the window, longer, single tokens.
CUTS = ((20, 20, 20), (2, 3, 30, 1, 24), (1, 59), (50, 7, 3))


def make(spec: str, memory: dict[str, Any] | None = None, **changes: Any) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(attention=spec, memory=memory, **{**SIZES, **changes}))
    open_memory(model)
    return model


def open_memory(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "tensor_cache.out" in name:
                p.normal_(0, 0.3)


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def segmented(model: Any, ids: torch.Tensor, cut: tuple[int, ...], detach: bool) -> torch.Tensor:
    """Return the losses by token; with `detach` each segment has a separate backward pass."""
    cache, found = TruncatedBPTTCache(model), []
    for part, wanted in zip(ids[:, :-1].split(cut, 1), ids[:, 1:].split(cut, 1), strict=True):
        loss = token_losses(model(input_ids=part, past_key_values=cache).logits, wanted)
        if detach:
            loss.sum().backward()
            cache.detach()
        found.append(loss)
    return torch.cat(found, 1)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def check(model: Any, cut: tuple[int, ...]) -> None:
    ids = torch.randint(1, 61, (2, 61))
    whole = token_losses(model(input_ids=ids[:, :-1]).logits, ids[:, 1:])
    whole.sum().backward()
    wanted = gradients(model)
    parts = segmented(model, ids, cut, detach=False)
    parts.sum().backward()
    found = gradients(model)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    assert wanted.keys() == found.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-3 * float(grad.abs().max()), msg=name)
    torch.testing.assert_close(segmented(model, ids, cut, detach=True), whole, rtol=1e-4, atol=1e-4)
    cut_off = gradients(model)
    assert any(not torch.allclose(cut_off[name], grad, rtol=1e-2, atol=1e-3) for name, grad in wanted.items())


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("spec", SPECS)
def test_segments_are_one_sequence(spec: str, cut: tuple[int, ...]) -> None:
    check(make(spec), cut)


@pytest.mark.parametrize("memory", MEMORIES)
def test_segments_are_one_sequence_for_every_kind_of_memory(memory: dict[str, Any]) -> None:
    check(make("sink:3 + window:8 + tc", memory), CUTS[1])


def test_a_memory_attached_to_a_model_is_kept_too() -> None:
    torch.manual_seed(0)
    model = tessera.attach(LlamaForCausalLM(LlamaConfig(**SIZES)), TensorCacheConfig(window=8, sink=3), freeze=False)
    open_memory(model)
    check(model, CUTS[0])


def test_a_later_segment_reads_what_an_earlier_one_wrote() -> None:
    first = torch.randint(1, 61, (1, 60))
    second = first.clone()
    second[0, 5] = (second[0, 5] + 1) % 60 + 1

    def late(spec: str) -> torch.Tensor:
        model = make(spec, num_hidden_layers=1).eval()
        ends = []
        for ids in (first, second):
            cache = TruncatedBPTTCache(model)
            with torch.no_grad():
                ends.append([model(input_ids=part, past_key_values=cache).logits for part in ids.split(20, 1)][-1])
        return (ends[0] - ends[1]).abs().amax()

    assert late("window:8") == 0
    assert late("window:8 + tc") > 1e-3


def test_what_is_kept_does_not_grow_and_has_no_graph() -> None:
    model, sizes = make("sink:3 + window:8 + tc"), []
    cache = TruncatedBPTTCache(model)
    for part in torch.randint(1, 61, (1, 100)).split(20, 1):
        model(input_ids=part, past_key_values=cache)
        assert any(x.requires_grad for x in tensors(cache))
        assert not any(x.requires_grad for x in tensors(cache.detach()))
        sizes.append(sum(x.numel() for x in tensors(cache)))
    assert len(set(sizes)) == 1
    assert cache.get_seq_length() == 100


def tensors(cache: TruncatedBPTTCache) -> list[torch.Tensor]:
    found = []
    for layer in cache.layers:
        assert layer.k is not None
        assert layer.v is not None
        assert layer.memory is not None
        found += [layer.k, layer.v, *layer.memory.tensors().values()]
    return found


def test_a_state_without_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="no bounded state to keep from segment to segment: layer 0 of it sees every token"):
        TruncatedBPTTCache(make("dense"))
    with pytest.raises(ValueError, match="layer 0 of it sees every token"):
        TruncatedBPTTCache(LlamaForCausalLM(LlamaConfig(**SIZES)))


def test_layers_without_a_memory_are_kept_with_their_window() -> None:
    model = tessera.attach(LlamaForCausalLM(LlamaConfig(**SIZES)).eval(), TensorCacheConfig(window=8, layers=(0,)))
    ids, cache = torch.randint(1, 61, (2, 40)), TruncatedBPTTCache(model)
    with torch.no_grad():
        found = [model(part, past_key_values=cache).logits for part in ids.split((15, 25), dim=1)]
        torch.testing.assert_close(torch.cat(found, dim=1), model(ids).logits, rtol=1e-4, atol=1e-4)


def test_padding_is_refused() -> None:
    model, ids = make("window:8"), torch.randint(1, 61, (2, 20))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="rows without padding"):
        model(input_ids=ids, attention_mask=mask, past_key_values=TruncatedBPTTCache(model))
