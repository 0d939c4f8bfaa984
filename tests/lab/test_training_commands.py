"""`tessera train lm` and `recall` run end to end: their files, interrupted runs, two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_training_loop import LOOP, losses, make, sample
from typer.testing import CliRunner

pytest.importorskip("accelerate", reason="the extra lab is not installed")
pytest.importorskip("tokenizers", reason="the extra lab is not installed")

import tessera
from tessera.cli import app
from tessera.evaluation import load
from tessera.lab.tasks.associative_recall import Recall
from tessera.lab.training.lm import LmConfig, prepare_lm, train_lm
from tessera.lab.training.loop import train
from tessera.lab.training.recall_training import RecallConfig, train_recall
from tessera.lab.training.schedule import LoopConfig, Phase

SMALL = ("--layers", "1", "--heads", "2", "--head-dim", "16", "--hidden", "32")
LM = ("--vocabulary", "270", "--kv-heads", "1", "--sequence", "32", "--batch", "4", *SMALL)


def run(*words: object) -> str:
    result = CliRunner().invoke(app, ["train", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize(
    ("spec", "more"),
    [("dense", ("--precision", "bf16")), ("sink:2 + window:8 + tc", ("--segments", 3, "--rule", "outer")), ("infini:8", ())],
)
def test_lm_leaves_a_model_that_can_be_used(small_text: Path, tmp_path: Path, spec: str, more: tuple[object, ...]) -> None:
    other = tmp_path / "other.txt"
    other.write_text("another text, with an é and a\ttab\n" * 30, encoding="utf-8")
    out = tmp_path / "run"
    said = run("lm", "--spec", spec, "--data", small_text, other, "--out", out, "--steps", 30, *LM, *more)
    assert "30 steps" in said
    curve = losses(out)
    assert curve[-1] < curve[0] - 0.1
    assert json.loads((out / "log.jsonl").read_text().splitlines()[-1])["held_out_loss"] < curve[0]
    assert list((out / "tensorboard").iterdir())
    assert (out / "loss.png").stat().st_size > 1000
    source = load(str(out / "model"))
    text = "line 7:\n\tthe é"
    ids = source.tokenizer(text, return_tensors="pt").input_ids
    assert ids[0, 0] == source.model.config.bos_token_id
    assert source.tokenizer.decode(ids[0, 1:]) == text
    assert source.model.config.attention == spec
    cache = {} if spec.startswith("infini") else {"past_key_values": tessera.Cache(spec, source.model)}
    assert source.model.generate(ids, max_new_tokens=5, do_sample=False, **cache).shape[1] == ids.shape[1] + 5
    if "tc" in spec:
        memory = source.model.model.layers[0].self_attn.tensor_cache
        assert memory.config.rule == "outer"
        assert memory.out.weight.abs().max() > 0


def test_the_end_of_each_file_is_held_out_of_training(small_text: Path, tmp_path: Path) -> None:
    tokenizer, corpus, held_out = prepare_lm(270, [small_text], tmp_path)
    text = small_text.read_text()
    assert text.endswith(held_out)
    assert len(held_out) == len(text) // 20
    trained = tokenizer.decode(corpus.tokens.tolist())
    assert trained == text[: -len(held_out)]
    again = prepare_lm(270, [small_text], tmp_path)
    assert again[2] == held_out
    assert again[0].to_str() == tokenizer.to_str()


def config(steps: int = 9) -> LmConfig:
    loop = LoopConfig(phases=(Phase(1.0, 16, 4, 2, 2),), steps=steps, mixed_precision="no", warmup_steps=2, log_every=4)
    return LmConfig("window:8 + tc", None, 32, 1, 2, 1, 16, 270, loop)


def same(a: Path, b: Path) -> None:
    for name in ("model", "average", "optimizer"):
        one, two = (sorted((run / "checkpoints").iterdir())[-1] / f"{name}.safetensors" for run in (a, b))
        assert one.parent.name == two.parent.name
        left, right = load_file(one), load_file(two)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left), name
    assert losses(a) == losses(b)
    left, right = load_file(a / "model" / "model.safetensors"), load_file(b / "model" / "model.safetensors")
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_a_resumed_lm_is_the_uninterrupted_one(small_text: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_lm(config(), [small_text], whole)
    train_lm(config(), [small_text], cut, stop_at=3)
    train_lm(config(), [small_text], cut, stop_at=6)
    train_lm(config(), [small_text], cut)
    same(whole, cut)


def test_a_resumed_recall_is_the_uninterrupted_one(tmp_path: Path) -> None:
    what = RecallConfig(Recall(pairs=2, gap=8), "window:4 + tc", dim=16, layers=1, hidden=32, batch=4, steps=9)
    found = train_recall(what, tmp_path / "whole", gaps=(0,))
    assert "accuracy" not in train_recall(what, tmp_path / "cut", gaps=(0,), stop_at=4)
    again = train_recall(what, tmp_path / "cut", gaps=(0,))
    same(tmp_path / "whole", tmp_path / "cut")
    assert {**found, "seconds": 0} == {**again, "seconds": 0}
    assert set(found["by_gap"]) == {"0", "8"}


def test_recall_begins_near_and_small(tmp_path: Path) -> None:
    what = RecallConfig(
        Recall(pairs=20, gap=8, rewrites=18), "window:4", dim=16, layers=1, hidden=32, batch=4, steps=10, near=0.3
    )
    assert [(until, t.gap, t.pairs, t.rewrites, t.asked) for until, t in what.tasks()] == [
        (0.3, 0, 16, 16, 16),
        (1.0, 8, 20, 18, 20),
    ]
    train_recall(what, tmp_path, show=False)
    tokens = [json.loads(line)["tokens"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert tokens[-1] == 4 * (3 * 80 + 7 * 104)
    assert [task.gap for _, task in replace(what, near=0.0).tasks()] == [8]


def test_recall_learns_says_so_and_saves(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("--pairs", 1, "--gap", 2, "--steps", 60, "--head-dim", 16, "--hidden", 64, "--layers", 1, "--batch", 32)
    said = run("recall", "--spec", "dense", "--out", out, *words)
    found = json.loads((out / "recall.json").read_text())
    assert f"accuracy {found['accuracy']:.3f} at the gap of 2" in said
    curve = losses(out)
    assert curve[-1] < curve[0]
    assert found["task"]["pairs"] == 1
    assert found["state_bytes"] == 1 * 2 * 5 * 2 * 16 * 4
    model: Any = load_model(out / "model")
    assert model.config.attention == "dense"


def load_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def test_another_recipe_is_refused_and_a_fresh_run_is_not(small_text: Path, tmp_path: Path) -> None:
    train_lm(config(2), [small_text], tmp_path)
    own = tmp_path / "notes.txt"
    own.write_text("not the run's")
    with pytest.raises(ValueError, match=r"run of another recipe \(hidden differs\)"):
        train_lm(replace(config(2), hidden=64), [small_text], tmp_path)
    state = train_lm(replace(config(2), hidden=64), [small_text], tmp_path, resume=False)
    assert state.step == 2
    assert load_model(tmp_path / "model").config.hidden_size == 64
    assert own.read_text() == "not the run's"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lm", "--spec", "windw:8"], "did you mean 'window'"),
        (["lm", "--spec", "hqmq:4"], "for caches, not for training"),
        (["lm", "--spec", "dense", "--rule", "outer"], "which has none; add 'tc'"),
        (["lm", "--spec", "dense", "--segments", "2", "--data", "{text}", *LM], "no bounded state to keep"),
        (["lm", "--data", "{tmp}/nothing.txt"], "there is no text file"),
        (["lm", "--data", "{text}", *LM, "--sequence", "5000"], "no source has 5001 tokens"),
        (["lm", "--precision", "fp16"], "must be 'bf16' or 'no', got 'fp16'"),
        (["lm", "--batch", "6", "--micro-batch", "4"], "micro_batch 4 does not divide batch 6"),
        (["lm", "--heads", "4", "--kv-heads", "3"], "kv_heads 3 does not divide heads 4"),
        (["lm", "--vocabulary", "100"], "which are all bytes"),
        (["lm", "--head-dim", "15"], "must be even"),
        (["lm", "--steps", "1", "--minutes", "1"], "--minutes or --steps"),
        (["recall", "--pairs", "0"], "pairs must lie between 1"),
        (["recall", "--spec", "infini"], "needs a whole number of tokens of at least 1, as in 'infini:64'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(words: list[str], message: str, small_text: Path, tmp_path: Path) -> None:
    given = [word.format(tmp=tmp_path, text=small_text) for word in words]
    result = CliRunner().invoke(app, ["train", *given, "--out", str(tmp_path / "run")])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_two_processes_learn_what_one_does(small_text: Path, tmp_path: Path) -> None:
    words = ["train", "lm", "--spec", "window:8 + tc", "--data", str(small_text), "--steps", "12", *LM, "--out"]
    here = Path(__file__).parent
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    leave, script = here.parent / "run_and_leave.py", here / "two_processes.py"
    script = ["--rdzv-endpoint", "localhost:0", str(leave), str(script), str(tmp_path), *words, str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, *script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("12 steps") == 1
    alone = make()
    train(alone, sample, LOOP, tmp_path / "alone")
    ranks = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1)]
    for name, parameter in alone.named_parameters():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        torch.testing.assert_close(ranks[0][name], parameter.detach(), rtol=1e-3, atol=1e-3, msg=name)
    assert losses(tmp_path / "loop") == pytest.approx(losses(tmp_path / "alone"), abs=1e-3)
    run(*words[1:], tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-3)
    assert len(losses(tmp_path / "two")) == 2
