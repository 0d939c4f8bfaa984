"""`tessera.using` switches a model's attention within a block, and restores it exactly afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_models import make, tokens
from test_attached_memory import CONFIG
from test_tensor_memory_calls import gemma3
from torch import nn

import tessera


def switched(model: Any) -> bool:
    return model.config.get_text_config()._attn_implementation == "tessera"


def everything(model: nn.Module) -> list[Any]:
    """Return everything in a model that `enable` could change."""
    found: list[Any] = []
    for module in model.modules():
        config = getattr(module, "config", None)
        own = {name for name in vars(module) if name.startswith("_tessera") or name.startswith("_attention")}
        found.append((getattr(config, "_attn_implementation", None), own, len(module._forward_pre_hooks)))
    return found


@pytest.mark.parametrize("kind", [make, gemma3])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_behind_the_block_the_model_is_what_it_was(kind: Any, attention: str) -> None:
    model = kind()
    model.set_attn_implementation(attention)
    before = everything(model)
    with tessera.using(model) as given:
        assert given is model
        assert switched(model)
        with pytest.raises(ValueError, match="output_attentions=True"):
            model(tokens(1, 4), output_attentions=True)
    assert everything(model) == before


def test_a_cache_made_within_the_block_switches_nothing_for_good() -> None:
    model, ids = make(), tokens(1, 30)
    before = everything(model)
    wanted = model.generate(ids, max_new_tokens=4, do_sample=False)
    with tessera.using(model):
        cache = tessera.Cache("dense", model)
        assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False), wanted)
    assert everything(model) == before


def test_blocks_are_nested_and_what_is_switched_within_them_is_undone() -> None:
    model = make()
    before = everything(model)
    with tessera.using(model):
        with tessera.using(model):
            assert switched(model)
            tessera.disable(model)
            assert not switched(model)
        assert switched(model)
        tessera.disable(model)
    assert everything(model) == before
    tessera.enable(model)
    enabled = everything(model)
    with tessera.using(model):
        tessera.disable(model)
    assert everything(model) == enabled
    assert not switched(tessera.disable(model))


def test_an_exception_ends_the_block_like_any_other_end() -> None:
    model = make()
    before = everything(model)
    with pytest.raises(KeyError), tessera.using(model):
        raise KeyError
    assert everything(model) == before


def test_a_model_that_cannot_be_switched_is_refused_before_the_block() -> None:
    with (
        pytest.raises(ValueError, match=r"tessera\.using: Linear cannot use Tessera's attention"),
        tessera.using(nn.Linear(2, 2)),
    ):
        pytest.fail("the block ran")


def test_a_wrapped_model_is_switched_within_its_wrapper() -> None:
    model = make()
    outer = nn.DataParallel(model)
    with tessera.using(outer) as given:
        assert given is outer
        assert switched(model)
    assert not switched(model)


def test_a_tensor_cache_attached_within_the_block_keeps_the_attention_it_needs_until_it_is_detached() -> None:
    model = make()
    wanted = model.config._attn_implementation
    with tessera.using(model):
        tessera.attach(model, CONFIG)
    model(tokens(1, 40))
    tessera.detach(model)
    assert model.config._attn_implementation == wanted
    with tessera.using(model):
        tessera.attach(model, CONFIG)
        tessera.detach(model)
        assert switched(model)
    assert model.config._attn_implementation == wanted
