"""A training step does not depend on how it is split into micro-batches and processes, and a run resumes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="the extra lab is not installed")

from tessera.lab.models.small_gpt import GPT, GPTConfig
from tessera.lab.training.loop import train
from tessera.lab.training.optimizers import make_optimizers
from tessera.lab.training.schedule import LoopConfig, Phase


def make(attention: str = "window:8 + tc", **memory: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(
        GPTConfig(
            attention=attention,
            memory=memory or None,
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=256,
            initializer_range=0.2,
        )
    )


def sample(seed: tuple[int, ...], batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, 40, (batch, length), generator=torch.Generator().manual_seed(hash(seed) % (1 << 31)))


LOOP = LoopConfig(phases=(Phase(1.0, 32, 4),), steps=6, mixed_precision="no", warmup_steps=2, log_every=1)


def losses(out: Path) -> list[float]:
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_size_of_a_forward_pass_changes_nothing_but_rounding(tmp_path: Path, precision: str) -> None:
    curves = []
    for micro in (1, 2, 4, None):
        train(
            make(), sample, replace(LOOP, phases=(Phase(1.0, 32, 4, micro),), mixed_precision=precision), tmp_path / str(micro)
        )
        curves.append(losses(tmp_path / str(micro)))
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], abs=2e-3 if precision == "no" else 2e-2)
    assert len(set(curves[0])) > 1


def test_targets_count_alike_wherever_they_are(tmp_path: Path) -> None:
    def uneven(seed: tuple[int, ...], batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = sample(seed, batch, length)
        targets = ids[:, 1:].clone()
        targets[0, 1:] = -100
        targets[1] = -100
        return ids[:, :-1], targets

    for micro in (1, 4):
        train(make(), uneven, replace(LOOP, phases=(Phase(1.0, 32, 4, micro),)), tmp_path / str(micro))
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "4"), abs=2e-3)


def test_noise_and_lines_of_the_log_are_those_of_an_uninterrupted_run(tmp_path: Path) -> None:
    config = replace(LOOP, steps=10, log_every=4)
    noisy = {"slots": 2, "slot_noise": 1.0}
    torch.manual_seed(1)
    whole = make(**noisy)
    train(whole, sample, config, tmp_path / "whole")
    train(make(**noisy), sample, config, tmp_path / "cut", stop_at=3)
    torch.rand(7)
    train(make(**noisy), sample, config, tmp_path / "cut", stop_at=6)
    again = make(**noisy)
    train(again, sample, config, tmp_path / "cut")
    for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert len(losses(tmp_path / "whole")) == 3  # of steps 4, 8 and 10


def test_tensorboard_has_the_numbers_of_the_log(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = replace(LOOP, tensorboard=True)
    train(make(), sample, config, tmp_path, stop_at=3)
    train(make(), sample, config, tmp_path, on_checkpoint=lambda moment: {"held_out_loss": 2.5})
    found = events.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    scalars = found.Scalars("loss")
    assert [point.step for point in scalars] == [1, 2, 3, 4, 5, 6]
    assert [point.value for point in scalars] == pytest.approx(losses(tmp_path))
    assert [(p.step, p.value) for p in found.Scalars("held_out_loss")] == [(6, 2.5)]


def test_a_loss_that_is_no_number_ends_the_run_before_it_spoils_the_weights(tmp_path: Path) -> None:
    model = make("dense")

    def loss(model: torch.nn.Module, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return next(model.parameters()).sum() * float("nan")

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(FloatingPointError, match="at step 1"):
        train(model, sample, LOOP, tmp_path, loss=loss)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_fresh_run_forgets_the_one_before(tmp_path: Path) -> None:
    train(make("dense"), sample, LOOP, tmp_path)
    state = train(make("dense"), sample, LOOP, tmp_path, resume=False, stop_at=2)
    assert state.step == 2
    assert len(losses(tmp_path)) == 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_gates_learn_at_a_rate_of_their_own_and_do_not_decay() -> None:
    model = make()
    optimizers = make_optimizers(model, muon_lr=1.0, adamw_lr=2.0, gate_lr=3.0, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: (g["peak_lr"], g["weight_decay"]) for o in optimizers for g in o.param_groups for p in g["params"]}
    assert set(rates) == set(names.values())
    assert {name.rpartition(".")[2] for name, rate in rates.items() if rate == (3.0, 0.0)} == {
        "gate_logit",
        "decay_logit",
        "rate_logit",
    }
    assert rates["model.embed_tokens.weight"] == (2.0, 0.1)
    assert rates["model.layers.0.mlp.up_proj.weight"] == (1.0, 0.1)
    assert rates["model.norm.weight"] == (2.0, 0.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch": 6, "micro_batch": 4}, "micro_batch 4 does not divide batch 6"),
        ({"sequence": 0}, "sequence must be at least 1, got 0"),
        ({"micro_batch": 0}, "micro_batch must be at least 1, got 0"),
        ({"until": 1.5}, "until must lie in"),
    ],
)
def test_phases_that_cannot_be_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Phase(**{"until": 1.0, "sequence": 32, "batch": 4, **fields})


def test_a_batch_is_shared_out_evenly() -> None:
    phase = Phase(1.0, 1024, 12)
    assert [phase.together(n) for n in (1, 2, 3, 12)] == [4, 3, 4, 1]
    assert Phase(1.0, 10_000, 4).together() == 1
    with pytest.raises(ValueError, match="12 sequences cannot be shared out among 5 processes"):
        phase.together(5)
    with pytest.raises(ValueError, match="does not divide the 6 sequences of each process"):
        replace(phase, micro_batch=4).together(2)
    with pytest.raises(ValueError, match="must be 'bf16' or 'no', got 'fp16'"):
        replace(LOOP, mixed_precision="fp16")


@pytest.mark.parametrize("attention", ["window:8 + tc", "sink:2 + window:8", "infini:8"])
def test_segments_with_a_kept_state_have_the_loss_of_the_whole_document(tmp_path: Path, attention: str) -> None:
    first = []
    for sequence, segments in ((96, 1), (32, 3), (24, 4)):
        out, model = tmp_path / str(segments), make(attention)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "tensor_cache.out" in name:
                    p.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
        phases = (Phase(1.0, sequence, 4, 2, segments),)
        state = train(model, sample, replace(LOOP, phases=phases, steps=3), out)
        assert state.tokens == 3 * 4 * 96
        first.append(losses(out)[0])
    # Only the first step is equal: gradients end with a segment, so later weights differ.
    assert first == pytest.approx([first[0]] * 3, abs=1e-3)


def test_segments_need_a_bounded_state(tmp_path: Path) -> None:
    config = replace(LOOP, phases=(Phase(1.0, 32, 4, 2, 2),))
    with pytest.raises(ValueError, match="no bounded state to keep"):
        train(make("dense"), sample, config, tmp_path / "run")
    with pytest.raises(ValueError, match="a loss of one's own"):
        train(make(), sample, config, tmp_path / "run", loss=lambda model, ids, targets: targets.sum())
    with pytest.raises(ValueError, match="cannot be compiled"):
        replace(config, compile=True)
    assert not (tmp_path / "run").exists()
