"""The benchmarks of the Tensor Memory measure what they claim."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tessera.tensor_memory import TensorMemoryConfig

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_the_paper_forgets_at_once_and_the_default_does_not(benchmark: Any) -> None:
    retention = benchmark("retention")
    lags = (8, 32, 128)
    paper = retention.gradients(TensorMemoryConfig.paper(), lags, 1, batch=4)
    ours = retention.gradients(TensorMemoryConfig(), lags, 1, batch=4)
    assert paper[1] < 1e-5
    assert paper[2] < 1e-12
    assert all(share > 0.1 for share in ours)
    recovered = retention.recovered(TensorMemoryConfig(), (1, 8), 1, sequences=192)
    assert 0.2 < recovered[1] < recovered[0] <= 1
    assert retention.recovered(TensorMemoryConfig.paper(), (8,), 1, sequences=192)[0] < 0.1


def test_the_cost_of_every_form_is_written(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cost = benchmark("tensor_memory_cost")
    monkeypatch.setattr(cost, "SIZES", ((1, 8, 12, {"channels": 4, "grid": (3, 3), "chunk": 2}),))
    path = tmp_path / "cost.json"
    monkeypatch.setattr(sys, "argv", ["tensor_memory_cost.py", "--repeats", "1", "--json", str(path)])
    assert cost.main() == 0
    rows = json.loads(path.read_text())["rows"]
    assert {(r["setting"], r["form"], r["way"]) for r in rows} == {
        (s, f, w) for s in cost.SETTINGS for f in cost.forms() for w in ("forward", "backward")
    }
    assert all(r["times"] == 1 for r in rows if r["form"] == cost.PLAIN)


def test_streams_are_measured_by_stretch_and_saved_beside_clips(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate", reason="the training extra is not installed")
    pytest.importorskip("sklearn", reason="the vision extra (scikit-learn) is not installed")
    video, pictures = benchmark("video"), benchmark("pictures")
    monkeypatch.setattr(video, "PLAN", ((8, 1, ("whole clip",)), (8, 2, ("frame, memory",))))
    monkeypatch.setattr(video, "FRAMES", 40)
    monkeypatch.setattr(video, "STREAMS", 8)
    monkeypatch.setattr(pictures, "ARMS", {"with a memory": pictures.ARMS["with a memory"]})
    for module in (video, pictures):
        path = tmp_path / f"{module.__name__}.json"
        monkeypatch.setattr(sys, "argv", [path.stem, "--seeds", "1", "--steps", "1", "--json", str(path)])
        assert module.main() == 0
    rows = json.loads((tmp_path / "video.json").read_text())["rows"]
    assert [(r["arm"], r["stay"]) for r in rows] == [("whole clip", 1), ("frame, memory", 2)]
    assert [len(rows[1][name]) for name in ("streams", "slow", "reads off")] == [3, 3, 3]
    assert "streams" not in rows[0]
    assert [r["ask"] for r in json.loads((tmp_path / "pictures.json").read_text())["rows"]] == ["label", "pixels"]


def test_a_stream_that_is_always_answered_rightly_has_every_stretch_right(benchmark: Any) -> None:
    video = benchmark("video")
    _, targets = video.MovingDigits(40).sample(8, video.Generator().manual_seed(1), held_out=True)

    def knows(frame: torch.Tensor, state: int | None) -> Any:
        at = state or 0
        logits = torch.nn.functional.one_hot(targets[:, at : at + 1].clamp(min=0), 10)
        return SimpleNamespace(logits=logits if at < 20 else -logits, state=at + 1)

    first, second, third = video.by_stretch(knows, video.MovingDigits(40), 8)
    assert (first, third) == (1, 0)
    assert 0 < second < 1

    def says_it_late(frame: torch.Tensor, state: int | None) -> Any:
        at = state or 0
        said = knows(frame, at // 4).logits
        return SimpleNamespace(logits=said if at % 4 == 3 else -said, state=at + 1)

    assert video.by_stretch(says_it_late, video.MovingDigits(40), 8, 4) == [first, second, third]
