"""The benchmarks of the Tensor Cache measure what they claim."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_the_cost_of_scan_and_streams_is_written(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cost = benchmark("associative_cost")
    path = tmp_path / "cost.json"
    arguments = ["--lengths", "64", "--stream", "2048", "--dense", "1024", "--repeats", "1", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["associative_cost.py", *arguments])
    assert cost.main() == 0
    record = json.loads(path.read_text())
    assert {(r["rule"], r["way"]) for r in record["scan"]} == {
        (r, w) for r in ("outer", "delta") for w in ("forward", "backward")
    }
    bounded = [r["nbytes"] for r in record["stream"] if r["spec"].startswith(("window", "sink"))]
    assert len(set(bounded)) == 2  # each the same at every length


@pytest.mark.parametrize("rule", ["outer", "delta"])
def test_a_long_stream_neither_breaks_nor_drifts(rule: str, benchmark: Any) -> None:
    long_run = benchmark("long_run")
    rows = long_run.follow(rule, 3000)
    assert {row["steps"] for row in rows} == {10, 100, 1000, 3000}
    for row in rows:
        assert row["finite"]
        assert row["share_of_bound"] <= 1
        assert row["float32_error"] < 1e-5
    # A decay smaller than bfloat16's resolution has no effect in bfloat16.
    last = {row["decay"]: row["bfloat16_error"] for row in rows if row["steps"] == 3000}
    assert last[0.99999] > 100 * 1e-5
