"""The oracle agrees with transformers' own attention, and treats documents and padding consistently."""

from __future__ import annotations

import pytest
import torch
from cache_machine import model_of
from cache_models import make, relative, tokens
from oracle import LayerOracle, LlamaOracle, Rules
from torch import Tensor

from tessera.adapters import attached_memory

SPECS = {
    "plain": ("sink:4 + hqmq:4 + recent:16", "hqmq:3@128 + recent:16", "sink:2 + window:20", "dense"),
    "tc": ("sink:2 + window:16 + tc",),
    "tc-rotary": ("sink:2 + window:16 + tc",),
    "tc-paper": ("window:16 + tc",),
    "tm": ("dense",),
}


def oracle(name: str, spec: str) -> LlamaOracle:
    model = model_of(name)
    done = attached_memory(model)
    memories = done.layers if done is not None and name != "tm" else {}
    count = model.config.num_hidden_layers
    layers = [LayerOracle(Rules.of(spec, layer=i, layers=count), memories.get(i)) for i in range(count)]
    return LlamaOracle(model, layers, done if name == "tm" else None)


def causal(real: Tensor, begin: int, end: int) -> Tensor:
    """Return a causal mask for slots [begin, end) of rows in which the slots `real`, (batch, slots), are tokens."""
    slot = torch.arange(end)
    return (slot <= slot[begin:, None]) & real[:, begin:end, None] & real[:, None, :end]


def alone(name: str, spec: str, ids: Tensor, cuts: tuple[int, ...]) -> Tensor:
    """Run rows without padding, (batch, tokens), in calls of these lengths."""
    truth, out, begin = oracle(name, spec), [], 0
    for n in cuts:
        positions = torch.arange(begin, begin + n).expand(len(ids), -1)
        real = torch.ones(len(ids), begin + n, dtype=torch.bool)
        out.append(truth.step(ids[:, begin : begin + n], positions, causal(real, begin, begin + n)))
        begin += n
    return torch.cat(out, 1)


@torch.no_grad()
def test_a_dense_llama_is_transformers_own() -> None:
    torch.manual_seed(0)
    model = make("llama", attn_implementation="eager")
    ids, real = tokens(2, 40), torch.ones(2, 40, dtype=torch.bool)
    real[1, :13] = False
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    truth = LlamaOracle(model, [LayerOracle(Rules.of("dense")) for _ in range(2)])
    found = torch.cat([truth.step(ids[:, a:b], positions[:, a:b], causal(real, a, b)) for a, b in ((0, 30), (30, 40))], 1)
    wanted = model(ids, attention_mask=real.long(), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "spec"), [(name, spec) for name, specs in SPECS.items() for spec in specs])
def test_padding_anywhere_changes_nothing(name: str, spec: str) -> None:
    torch.manual_seed(1)
    ids, cuts = tokens(1, 150), (100, 1, 49)
    wanted = alone(name, spec, ids, cuts)
    # The same tokens with padding in between: (slots before the padding, its length) for each call.
    truth, begin, slots = oracle(name, spec), 0, 0
    real, found = torch.zeros(1, 0, dtype=torch.bool), []
    for n, (at, pads) in zip(cuts, ((40, 9), (0, 70), (49, 3)), strict=True):
        new = torch.ones(1, n + pads, dtype=torch.bool)
        new[:, at : at + pads] = False
        given, positions = torch.full((1, n + pads), 5), torch.zeros(1, n + pads, dtype=torch.long)
        given[new], positions[new] = ids[0, begin : begin + n], torch.arange(begin, begin + n)
        real = torch.cat((real, new), 1)
        found.append(truth.step(given, positions, causal(real, slots, slots + n + pads))[new])
        begin, slots = begin + n, slots + n + pads
    assert relative(torch.cat(found), wanted[0]) < 1e-5


@pytest.mark.parametrize("name", ["tc", "tc-rotary", "tc-paper"])
def test_a_document_behind_another_begins_anew(name: str) -> None:
    torch.manual_seed(2)
    (spec,) = SPECS[name]
    first, second = tokens(1, 60), tokens(1, 50)
    truth = oracle(name, spec)
    ids, document = torch.cat((first, second), 1), torch.tensor([0] * 60 + [1] * 50)
    positions = torch.cat((torch.arange(60), torch.arange(50)))[None]
    visible = causal(torch.ones(1, 110, dtype=torch.bool), 0, 110) & (document[:, None] == document)
    # Split within the second document, whose remainder does not see the first either.
    found = torch.cat([truth.step(ids[:, a:b], positions[:, a:b], visible[:, a:b, :b]) for a, b in ((0, 80), (80, 110))], 1)
    wanted = torch.cat((alone(name, spec, first, (60,)), alone(name, spec, second, (50,))), 1)
    assert relative(found, wanted) < 1e-5


def test_the_spec_matters_to_the_oracle() -> None:
    """Each tier changes results by far more than the tolerance of the other tests."""
    torch.manual_seed(3)
    ids = tokens(1, 220)
    exact = alone("plain", "dense", ids, (150, 70))
    for spec in ("window:20", "sink:2 + window:20", "sink:4 + hqmq:4 + recent:16", "sink:5 + hqmq:4 + recent:16", "hqmq:4@64"):
        assert relative(alone("plain", spec, ids, (150, 70)), exact) > 2e-3
    for name in ("tc", "tm"):
        (spec,) = SPECS[name]
        model = model_of(name)
        with_memory = alone(name, spec, ids, (220,))
        layers = [LayerOracle(Rules.of(spec.removesuffix(" + tc"))) for _ in range(2)]
        without = LlamaOracle(model, layers).step(
            ids, torch.arange(220)[None], causal(torch.ones(1, 220, dtype=torch.bool), 0, 220)
        )
        assert relative(with_memory, without) > 0.05
