"""Training a memory changes only the memory, learns from the dense model or the text, and resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import tessera
from tessera.adapters import attached_memory, tensor_cache
from tessera.cli.app import app
from tessera.lab.evaluation.language import loss_by_distance
from tessera.lab.training.memory import MemoryTraining, train_memory
from tessera.lab.training.schedule import LoopConfig, Phase
from tessera.tensor_cache import TensorCacheConfig


def make() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
        max_position_embeddings=256,
        pad_token_id=0,
    )
    return tessera.attach(LlamaForCausalLM(config).eval(), TensorCacheConfig(window=8, sink=2, chunk=16))


def sample(seed: tuple[int, ...], batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, 40, (batch, length), generator=torch.Generator().manual_seed(hash(seed) % (1 << 31)))


def loop(steps: int = 30) -> LoopConfig:
    return LoopConfig(
        phases=(Phase(1.0, 48, 4, 2),), steps=steps, mixed_precision="no", adamw_lr=1e-2, muon_lr=1e-2, warmup_steps=2
    )


def distance(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """Return the mean KL to the dense model beyond the window."""
    with torch.no_grad():
        dense = model(ids, past_key_values=tessera.Cache("dense", model)).logits[:, 8:].log_softmax(-1)
        found = model(ids).logits[:, 8:].log_softmax(-1)
    return float((dense.exp() * (dense - found)).sum(-1).mean())


def test_distillation_brings_the_model_closer_to_its_dense_self(tmp_path: Path) -> None:
    model = make()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if "tensor_cache" not in n}
    ids = sample((9, 9), 8, 48)
    before = distance(model, ids)
    train_memory(model, sample, loop(80), tmp_path)
    model.eval()
    assert distance(model, ids) < 0.99 * before
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    loaded = LlamaForCausalLM(model.config)
    loaded.load_state_dict({n: p for n, p in frozen.items()})
    tessera.load_memory(loaded.eval(), tmp_path / "memory.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_text_and_windows_of_many_lengths(tmp_path: Path) -> None:
    model = make()
    state = train_memory(model, sample, loop(6), tmp_path, MemoryTraining("ce", windows=(4, 8, 20)))
    assert state.step == 6
    done = attached_memory(model)
    assert done is not None
    assert done.config.window == 8
    assert all(layer.out.weight.abs().max() > 0 for layer in done.layers.values())


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole, cut = make(), make()
    drawn = MemoryTraining(windows=(4, 8, 20))
    train_memory(whole, sample, loop(10), tmp_path / "whole", drawn)
    train_memory(cut, sample, loop(10), tmp_path / "cut", drawn, stop_at=4)
    again = make()
    train_memory(again, sample, loop(10), tmp_path / "cut", drawn)
    for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_loss_by_distance_is_that_of_the_whole_sequence() -> None:
    model = make()
    ids = sample((1,), 3, 100)
    streamed = loss_by_distance(model, ids, "sink:2 + window:8 + tc", (1, 20, 100), chunk=16)
    assert streamed == pytest.approx(loss_by_distance(model, ids, None, (1, 20, 100)), rel=1e-3)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="objective must be 'kl' or 'ce'"):
        MemoryTraining("mse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="end within a window of 50"):
        train_memory(make(), sample, loop(), tmp_path, MemoryTraining(windows=(8, 50)))
    with pytest.raises(ValueError, match="nothing is attached"):
        train_memory(tessera.detach(make()), sample, loop(), tmp_path)


def test_the_command_trains_a_memory_that_a_cache_can_use(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["train", "memory", "--model", str(small_model), "--data", str(small_text), "--out", str(out)]
    found = CliRunner().invoke(app, [*arguments, "--window", "16", "--sequence", "64", "--batch", "2", "--steps", "3"])
    assert found.exit_code == 0, found.output
    assert list((out / "tensorboard").iterdir())
    model = tessera.load_memory(LlamaForCausalLM.from_pretrained(small_model), out / "memory.safetensors")
    tessera.Cache("sink:4 + window:16 + tc", model)
    wrong = CliRunner().invoke(app, [*arguments, "--rule", "oja", "--steps", "1"])
    assert wrong.exit_code != 0
    assert "rule must be one of" in wrong.output


def test_parts_of_a_batch_learn_at_the_window_of_their_step(tmp_path: Path) -> None:
    drawn = MemoryTraining("ce", windows=(4, 8, 20))
    found = []
    for name, micro in (("whole", 4), ("parts", 1)):
        model = make()
        train_memory(model, sample, replace(loop(8), phases=(Phase(1.0, 48, 4, micro),)), tmp_path / name, drawn)
        found.append({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-2, atol=1e-3)


def test_a_run_of_another_recipe_is_not_gone_on_with(tmp_path: Path) -> None:
    train_memory(make(), sample, loop(2), tmp_path)
    other = tessera.attach(tessera.detach(make()), TensorCacheConfig(window=8, sink=2, chunk=16, rule="outer"))
    with pytest.raises(ValueError, match=r"another recipe \(memory differs\)"):
        train_memory(other, sample, loop(4), tmp_path)
    train_memory(other, sample, loop(4), tmp_path, resume=False)


def test_a_model_with_dropout_is_its_own_teacher(tmp_path: Path) -> None:
    model = make()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    train_memory(model, sample, loop(2), tmp_path)


def test_the_command_takes_the_options_of_a_memory_and_draws_windows(
    small_model: Path, small_text: Path, tmp_path: Path
) -> None:
    arguments = ["train", "memory", "--model", str(small_model), "--data", str(small_text), "--out", str(tmp_path / "run")]
    options = [
        "--window",
        "6",
        "--windows",
        "6",
        "12",
        "--rates",
        "token",
        "--gate",
        "token",
        "--slots",
        "2",
        "--rotary",
        "--raw-queries",
    ]
    found = CliRunner().invoke(app, [*arguments, *options, "--batch", "2", "--steps", "3"])
    assert found.exit_code == 0, found.output
    assert f"{3 * 2 * 8 * 12:,} tokens" in found.output  # sequences of eight of the longest windows
    model = tessera.load_memory(LlamaForCausalLM.from_pretrained(small_model), tmp_path / "run" / "memory.safetensors")
    config = tensor_cache(model).config
    assert (config.window, config.rates, config.gate, config.slots) == (6, "token", "token", 2)
    assert (config.rotary, config.normalise_queries) == (True, False)
