"""The benchmarks of the Tensor Cache measure what they say."""

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


def test_few_pairs_are_recalled_and_many_are_not(benchmark: Any) -> None:
    capacity = benchmark("capacity")
    assert capacity.recalled("outer", 1.0, 1.0, 64, 8, 4, 0) == 1.0
    assert capacity.recalled("outer", 1.0, 1.0, 16, 256, 4, 0) < 0.2
    # A matrix that forgets at once holds the last pair only.
    assert capacity.recalled("outer", 1e-6, 0.5, 64, 8, 4, 0) < 0.5


def test_a_recall_run_trains_and_measures_one_model(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recall = benchmark("recall")
    monkeypatch.setattr(recall, "MEASURED", 4)
    job = {"pairs": 4, "dim": 16, "rewrites": 2, "steps": 2, "method": "Tensor Cache, delta", "seed": 0}
    row = recall.run(job)
    assert set(row["by_gap"]) == {str(gap) for gap in recall.GAPS}
    assert 0 <= row["accuracy"] <= 1
    assert recall.state_bytes("window", 64, 10_000) == 2 * 2 * 16 * 2 * 64 * 4
    assert recall.state_bytes("dense", 64, 100) == 2 * 2 * 100 * 2 * 64 * 4
    jobs = recall.plan(3, 600)
    assert len({recall.key(job) for job in jobs}) == len(jobs)
    assert all(len([j for j in jobs if j["method"] == m and j["pairs"] == 16 and j["dim"] == 64]) >= 3 for m in recall.METHODS)


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
    # What decays by less than bfloat16 resolves does not decay in it.
    last = {row["decay"]: row["bfloat16_error"] for row in rows if row["steps"] == 3000}
    assert last[0.99999] > 100 * 1e-5
