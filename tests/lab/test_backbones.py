"""Backbones have equal parameters, are causal with and without a memory, and respect their windows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tessera.lab.models.backbones import KINDS, BackboneConfig, build_backbone, parameters
from tessera.tensor_memory import TensorMemoryConfig

SMALL = BackboneConfig(
    features=5, classes=3, frame=3, width=16, layers=2, heads=2, hidden=32, memory=TensorMemoryConfig(channels=8, grid=(4, 4))
)
ATTENTION = ("whole", "window:2", "frame")


@pytest.mark.parametrize(("width", "channels", "chunk"), [(64, 32, 1), (64, 16, 4), (96, 24, 1)])
def test_kinds_have_as_many_parameters(width: int, channels: int, chunk: int) -> None:
    memory = TensorMemoryConfig.paper(channels=channels, chunk=chunk)
    config = replace(SMALL, width=width, hidden=4 * width, memory=memory)
    counts = {kind: parameters(build_backbone(replace(config, kind=kind))) for kind in KINDS}
    assert counts["plain"] < counts["memory"]
    for kind in ("wide", "slots"):
        assert abs(counts[kind] - counts["memory"]) < 0.01 * counts["memory"]


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("kind", KINDS)
def test_no_answer_depends_on_a_later_token(kind: Any, attention: str) -> None:
    model = build_backbone(replace(SMALL, kind=kind, attention=attention))
    x = torch.randn(2, 9, 5)
    changed = x.clone()
    changed[:, 6] += 1
    with torch.no_grad():
        before, after = model(x).logits, model(changed).logits
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6], after[:, 6])


@pytest.mark.parametrize(("attention", "reached"), [("whole", range(2, 12)), ("window:2", range(2, 5)), ("frame", range(2, 3))])
@pytest.mark.parametrize("kind", ["plain", "wide", "slots"])
def test_attention_passes_on_what_it_may_and_a_memory_all_the_rest(kind: Any, attention: str, reached: range) -> None:
    x = torch.randn(2, 12, 5)
    changed = x.clone()
    changed[:, 2] += 1

    def differ(config: BackboneConfig) -> list[int]:
        model = build_backbone(config)
        with torch.no_grad():
            return (model(x).logits - model(changed).logits).abs().amax((0, 2)).gt(1e-6).nonzero().flatten().tolist()

    config = replace(SMALL, kind=kind, attention=attention)
    assert differ(config) == list(reached)
    assert config.reach() in (None, len(reached))
    assert differ(replace(config, kind="memory")) == list(range(2, 12))


def test_the_same_seed_makes_the_same_model_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = (build_backbone(replace(SMALL, kind="slots"), seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.head.weight, other.head.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_learns(kind: Any) -> None:
    model = build_backbone(replace(SMALL, kind=kind))
    model(torch.randn(2, 6, 5)).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "thin"}, "kind must be one of 'plain', 'wide', 'slots', 'memory', got 'thin'"),
        ({"attention": "window:0"}, "as in 'window:8'; got '0'"),
        ({"attention": "dense"}, "unknown word 'dense' in 'dense'"),
        ({"width": 18}, "even multiple of the 2 heads, got 18"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"memory": TensorMemoryConfig(anchored=True)}, "places have 0"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **fields)
