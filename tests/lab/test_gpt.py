"""`GPT` trains, generates, is causal, and can be saved and loaded with every kind of attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import tessera
from tessera.lab.models.small_gpt import GPT, GPTConfig

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
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
SPECS = ("dense", "window:8", "sink:2 + window:8", "infini:8", "window:8 + tc", "sink:2 + window:8 + tc")


def make(spec: str, **changes: Any) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(attention=spec, **{**SIZES, **changes})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "tensor_cache.out" in name:
                p.normal_(0, 0.3)
    return model


def ids(rows: int = 2, count: int = 40) -> torch.Tensor:
    return torch.randint(2, 61, (rows, count))


@pytest.mark.parametrize("spec", SPECS)
def test_no_output_depends_on_a_later_token(spec: str) -> None:
    model, first = make(spec), ids(1)
    second = first.clone()
    second[0, 25] = (second[0, 25] - 1) % 59 + 2
    with torch.no_grad():
        change = (model(first).logits - model(second).logits).abs().amax(-1)[0]
    assert change[:25].max() == 0
    assert change[25] > 0


@pytest.mark.parametrize("spec", SPECS)
def test_everything_learns(spec: str) -> None:
    model, tokens = make(spec).train(), ids()
    model(tokens, labels=tokens).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name


@pytest.mark.parametrize("spec", SPECS)
def test_generation_is_what_whole_sequences_say(spec: str) -> None:
    model, tokens = make(spec), ids(2, 20)
    found = model.generate(tokens, max_new_tokens=15, do_sample=False)
    with torch.no_grad():
        wanted = model(found[:, :-1]).logits[:, 19:].argmax(-1)
    assert torch.equal(found[:, 20:], wanted)


@pytest.mark.parametrize("spec", [s for s in SPECS if not s.startswith("infini")])
def test_a_cache_of_the_same_spec_gives_the_same(spec: str) -> None:
    model, tokens = make(spec), ids(2, 60)
    with torch.no_grad():
        whole = model(tokens).logits
        cache, parts = tessera.Cache(spec, model), []
        for part in tokens.split((30, 1, 1, 28), dim=1):
            parts.append(model(part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("spec", SPECS)
def test_it_is_saved_and_loaded_by_the_auto_classes(spec: str, tmp_path: Path) -> None:
    model, tokens = make(spec), ids()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, GPT)
    assert AutoConfig.from_pretrained(tmp_path).attention == spec
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, model(tokens).logits)


def test_dense_is_a_llama() -> None:
    model = make("dense")
    llama = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    llama.load_state_dict(model.state_dict())
    tokens = ids()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, llama(tokens).logits, rtol=1e-4, atol=1e-5)


def test_a_window_is_that_of_the_cache_over_a_llama() -> None:
    model = make("sink:2 + window:8")
    llama = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    llama.load_state_dict(model.state_dict())
    tokens = ids()
    with torch.no_grad():
        wanted = llama(tokens, past_key_values=tessera.Cache("sink:2 + window:8", llama)).logits
        torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "memory", "message"),
    [
        ("infini", None, "needs a whole number of tokens of at least 1, as in .infini:64."),
        ("hqmq:4", None, "for caches, not for training"),
        ("window:0", None, "at least 1 token"),
        ("window:8", {"rule": "outer"}, "which has none; add 'tc'"),
        ("window:8 + tc", {"rules": "outer"}, "has no 'rules'"),
        ("windw:8", None, "did you mean 'window'"),
    ],
)
def test_specs_that_cannot_be_are_refused(spec: str, memory: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(attention=spec, memory=memory)


def test_infini_has_no_tiers_for_a_cache() -> None:
    model = make("infini:8")
    with torch.no_grad(), pytest.raises(ValueError, match="keeps its own memory"):
        model(ids(), past_key_values=tessera.Cache("dense", model))


def test_infini_refuses_padding_before_its_segments() -> None:
    model, mask = make("infini:8"), torch.ones(2, 40, dtype=torch.int64)
    tokens = torch.randint(1, 61, (2, 40))
    mask[1, :13] = 0
    with torch.no_grad(), pytest.raises(ValueError, match="one document without padding"):
        model(tokens, attention_mask=mask)


def test_rates_stay_in_float32_when_a_model_is_loaded_in_half_precision(tmp_path: Path) -> None:
    model = make("sink:2 + window:8 + tc")
    model.save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path, dtype=torch.bfloat16)
    found = {name: p for name, p in loaded.named_parameters() if "tensor_cache.memory" in name}
    assert found
    for name, p in found.items():
        assert torch.equal(p, model.get_parameter(name)), name
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert loaded(ids()).logits.isfinite().all()
