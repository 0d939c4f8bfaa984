from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

pytest.importorskip("accelerate", reason="the extra lab is not installed")
pytest.importorskip("tokenizers", reason="the extra lab is not installed")

from tessera.lab.cli.train import app
from tessera.lab.training.causal_attention import blockwise_attention
from tessera.lab.training.corpus import Corpus, training_files
from tessera.lab.training.demo import TINY, train_demo
from tessera.lab.training.log import read_log
from tessera.lab.training.schedule import LoopConfig, Phase
from tessera.lab.training.standard_library import heldout_source
from tessera.models import heldout_files, heldout_text


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the command once, without interruption."""
    out = tmp_path_factory.mktemp("run") / "demo"
    result = CliRunner().invoke(app, ["demo", "--out", str(out), "--tiny", "--steps", "8"])
    assert result.exit_code == 0, result.output
    assert "8 steps" in result.output
    return out


def test_command_trains_logs_and_exports(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    records = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 9))
    assert [r["sequence"] for r in records if "loss" in r] == [64] * 4 + [128] * 4
    assert records[-1]["held_out_bits_per_byte"] > 0
    assert (finished / "loss.png").stat().st_size > 1000
    assert len(json.loads((finished / "summary.json").read_text())["training"]) == 8
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    text = "def main():\n\treturn 'é', 1 \n\n"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id == model.config.bos_token_id
    assert tokenizer.decode(ids[0, 1:]) == text
    assert model(ids).logits.shape == (1, ids.shape[1], 512)


def test_resumed_run_gives_the_weights_of_an_uninterrupted_one(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    config = replace(TINY, loop=replace(TINY.loop, steps=8))
    train_demo(config, out, evaluate_bytes=4_000, stop_at=3)
    with (out / "log.jsonl").open("a") as log:  # as if the run had been killed between two checkpoints
        log.write(json.dumps({"step": 5, "tokens": 1280, "loss": 99.0}) + "\n")
    train_demo(config, out, evaluate_bytes=4_000, stop_at=6)
    state = train_demo(config, out, evaluate_bytes=4_000)
    assert (state.step, state.tokens) == (8, 8 * 256)
    records = [record for record in read_log(out / "log.jsonl") if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, 9))
    assert max(record["loss"] for record in records) < 99
    for name in ("model", "average", "optimizer"):
        whole, parts = (load_file(run / "checkpoints" / "step-00000008" / f"{name}.safetensors") for run in (finished, out))
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole), name


def test_finished_run_has_nothing_left_to_do(finished: Path) -> None:
    before = load_file(finished / "checkpoints" / "step-00000008" / "model.safetensors")
    result = CliRunner().invoke(app, ["demo", "--out", str(finished), "--tiny", "--steps", "8"])
    assert result.exit_code == 0, result.output
    after = load_file(finished / "checkpoints" / "step-00000008" / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_another_recipe_is_refused(finished: Path) -> None:
    with pytest.raises(ValueError, match="another recipe"):
        train_demo(replace(TINY, layers=3), finished)


def test_budget_is_given_once() -> None:
    result = CliRunner().invoke(app, ["demo", "--steps", "1", "--minutes", "1"])
    assert result.exit_code != 0


def test_schedule_warms_up_holds_and_decays() -> None:
    phases = (Phase(0.5, 64, 4, 2), Phase(1.0, 128, 2, 2))
    config = LoopConfig(phases=phases, steps=100, warmup_steps=10, decay_from=0.5)
    rates = [config.rate(step, config.progress(step, 0)) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:51] == pytest.approx([1.0] * 41)
    assert rates[75] == pytest.approx(0.5)
    assert config.phase(0.49) is phases[0]
    assert config.phase(0.5) is config.phase(1.0) is phases[1]
    timed = LoopConfig(phases=phases, minutes=2)
    assert timed.progress(10_000, 60) == 0.5
    with pytest.raises(ValueError, match="either"):
        LoopConfig(phases=phases)
    with pytest.raises(ValueError, match="last at 1"):
        LoopConfig(phases=phases[:1], steps=1)


def test_held_out_modules_are_not_trained_on() -> None:
    held_out = {file.read_bytes() for file in heldout_files()}
    assert len(held_out) >= 20
    trained = [file.text.encode() for file in training_files(())]
    assert len(trained) > 100
    assert held_out.isdisjoint(trained)
    assert not any(text in heldout_text().encode() for text in trained)
    assert len(set(trained)) == len(trained)


def test_heldout_text_is_a_prefix_of_itself() -> None:
    whole = heldout_text()
    assert len(whole) > 100_000
    assert heldout_text(10_000) == whole.encode()[:10_000].decode(errors="ignore")
    assert heldout_text(0) == ""
    with pytest.raises(ValueError, match="negative"):
        heldout_text(-1)


def test_the_held_out_text_that_ships_is_that_of_the_python_it_was_made_with() -> None:
    assert hashlib.sha256(heldout_text().encode()).hexdigest().startswith("addc62e316d7eddd")
    if sys.version_info[:3] != (3, 11, 7):
        pytest.skip("the text was made with Python 3.11.7")
    assert heldout_text() == heldout_source()


def test_windows_depend_on_their_seed_alone(finished: Path) -> None:
    corpus = Corpus(finished / "corpus")
    first = corpus.sample((0, 1), 4, 65)
    assert first.shape == (4, 65)
    assert torch.equal(first, corpus.sample((0, 1), 4, 65))
    assert not torch.equal(first, corpus.sample((0, 2), 4, 65))
    assert (first[:, 0] == corpus.bos).all()
    with pytest.raises(ValueError, match="no source"):
        corpus.sample((0,), 1, len(corpus.tokens) + 1)


@pytest.mark.parametrize("tokens", [1, 37, 300])
def test_blockwise_attention_is_causal_attention(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, tokens, 16, generator=generator, requires_grad=True) for _ in range(3))
    ours = blockwise_attention(q, k, v, scale=0.25, block=64)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(ours.float(), theirs, atol=2e-2, rtol=2e-2)
    weight = torch.randn(theirs.shape, generator=generator)
    mine = torch.autograd.grad((ours.float() * weight).sum(), (q, k, v))
    reference = torch.autograd.grad((theirs * weight).sum(), (q, k, v))
    for a, b in zip(mine, reference, strict=True):
        torch.testing.assert_close(a, b, atol=5e-2, rtol=5e-2)
