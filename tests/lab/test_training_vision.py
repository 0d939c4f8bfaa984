"""`tessera train image` and `video` run end to end: their losses, files, and interrupted runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

pytest.importorskip("accelerate", reason="the extra lab is not installed")
pytest.importorskip("sklearn", reason="the extra lab is not installed")
pytest.importorskip("PIL", reason="the extra lab is not installed")

from PIL import Image

from tessera.cli import app
from tessera.lab.models import ViT
from tessera.lab.tasks.digits import Digits
from tessera.lab.tasks.moving_digits import MovingDigits
from tessera.lab.training.vision import VisionConfig, train_vision

SMALL = ("--layers", "1", "--heads", "2", "--hidden", "32")


def run(*words: object) -> str:
    result = CliRunner().invoke(app, ["train", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.stdout


def result(out: Path, name: str) -> tuple[dict[str, Any], list[float]]:
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return json.loads((out / f"{name}.json").read_text()), [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize(("ask", "steps"), [("label", 120), ("pixels", 20)])
def test_image_learns_says_so_and_saves(tmp_path: Path, ask: str, steps: int) -> None:
    said = run("image", "--ask", ask, "--steps", steps, "--batch", 32, "--patch", 4, "--out", tmp_path, *SMALL)
    found, losses = result(tmp_path, "image")
    assert f"{found['score']:.3f} on what was held out (chance {found['chance']:.3f}, at most 1)" in said
    assert losses[-1] < losses[0] * 0.9
    if ask == "label":
        assert found["score"] > found["chance"] + 0.1
    model = ViT.from_pretrained(tmp_path / "model").eval()
    assert model.memory.config.channels == found["memory"]["channels"]
    task = Digits(ask, patch=4)  # type: ignore[arg-type]
    pixels, targets = task.test()
    with torch.no_grad():
        masked = {} if ask == "label" else {"masked": (targets != -100).any(-1)}
        assert task.score(model(pixels, **masked).logits, targets) == pytest.approx(found["score"], abs=1e-5)


def test_video_runs_says_so_and_saves(tmp_path: Path) -> None:
    words = ("--steps", 12, "--batch", 4, "--frames", 8, "--patch", 16, "--memory", "paper")
    said = run("video", *words, "--out", tmp_path, *SMALL)
    found, losses = result(tmp_path, "video")
    assert f"accuracy {found['score']:.3f} on what was held out (chance 0.111, at most 1)" in said
    assert len(losses) == 2
    model = ViT.from_pretrained(tmp_path / "model").eval()
    task = MovingDigits(8, patch=16)
    clips, targets = task.test()
    state, said = None, []
    with torch.no_grad():
        for frame in clips.split(1, dim=1):
            out = model(frame, state)
            state = out.state
            said.append(out.logits)
    assert task.score(torch.cat(said, dim=1), targets) == pytest.approx(found["score"], abs=2e-3)


def test_folders_of_ones_own(tmp_path: Path) -> None:
    for shade in (0, 255):
        for number in range(5):
            for frame in range(3):
                path = tmp_path / "clips" / str(shade) / str(number) / f"{frame}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (shade, 128, 0)).save(path)
            path = tmp_path / "pictures" / str(shade) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (shade, 128, 0)).save(path)
    words = ("--size", 8, "--patch", 4, "--steps", 25, "--batch", 8, *SMALL)
    run("image", "--data", tmp_path / "pictures", "--out", tmp_path / "a", *words)
    run("video", "--data", tmp_path / "clips", "--frames", 3, "--attention", "window:2", "--out", tmp_path / "b", *words)
    for out, name in (("a", "image"), ("b", "video")):
        found, _ = result(tmp_path / out, name)
        assert found["score"] == 1
        assert found["chance"] == 0.5


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    task = Digits(patch=4)
    config = VisionConfig(hidden=16, layers=1, heads=2, batch=4, steps=6, memory={"channels": 2, "grid": (2, 2)})
    whole = train_vision(config, task, tmp_path / "whole", "image")
    assert "score" not in train_vision(config, task, tmp_path / "cut", "image", stop_at=3)
    again = train_vision(config, task, tmp_path / "cut", "image")
    assert {**whole, "seconds": 0} == {**again, "seconds": 0}
    left, right = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(left[key], right[key]) for key in left)
    with pytest.raises(ValueError, match=r"another recipe \(patch differs\)"):
        train_vision(config, Digits(patch=2), tmp_path / "cut", "image")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["image", "--ask", "name"], "'label' or 'pixels', got 'name'"),
        (["image", "--patch", "3"], "patch 3 does not divide"),
        (["image", "--memory", "big"], "memory must be one of none, default, paper, got 'big'"),
        (["image", "--data", "{tmp}/nothing"], "there is no folder"),
        (["image", "--hidden", "30"], "must be a multiple of twice"),
        (["image", "--precision", "fp16"], "must be 'bf16' or 'no', got 'fp16'"),
        (["video", "--attention", "windw:4"], "unknown word 'windw' in 'windw:4'; did you mean 'window'"),
        (["video", "--frames", "1"], "two frames at least"),
        (["video", "--batch", "6", "--micro-batch", "4"], "micro_batch 4 does not divide batch 6"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    given = [word.format(tmp=tmp_path) for word in words]
    result = CliRunner().invoke(app, ["train", *given, "--out", str(tmp_path / "run")])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "run").exists()
