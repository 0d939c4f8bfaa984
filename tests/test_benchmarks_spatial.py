"""The benchmarks of the Tensor Memory measure what they say."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tessera.spatial import TensorMemoryConfig

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
