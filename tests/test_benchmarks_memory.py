"""The benchmark of resident memory prints and writes its results, on caches of a few mebibytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "resident_memory.py"
OURS = "sink:4 + hqmq:4 + recent:128"
TOKENS = 3000


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))
    import resident_memory

    return resident_memory


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Return the output and the JSON of a short run."""
    path = tmp_path_factory.mktemp("results") / "new" / "memory.json"
    command = [sys.executable, str(SCRIPT), "--tokens", str(TOKENS), "--layers", "3", "--json", str(path)]
    command += ["--specs", "dense", "recent:128+hqmq:4+sink:4"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stderr
    assert [p.name for p in path.parent.iterdir()] == ["memory.json"]
    return done.stdout, json.loads(path.read_text(encoding="utf-8"))


def test_what_was_measured_is_said(run: tuple[str, dict[str, Any]]) -> None:
    text, result = run
    assert result["tokens"] == TOKENS
    assert result["model"] == {"layers": 3, "heads": 16, "kv_heads": 4, "head_dim": 128, "dtype": "bfloat16"}
    assert {"tessera", "torch", "transformers", "python"} <= result["versions"].keys()
    assert [row["spec"] for row in result["rows"]] == ["DynamicCache", "dense", OURS]
    for row in result["rows"]:
        assert row["spec"] in text
        assert row["dense_bytes"] == 2 * 3 * 4 * 128 * 2 * TOKENS


def test_packed_caches_report_fewer_bytes_than_exact_ones(run: tuple[str, dict[str, Any]]) -> None:
    exact, dense, packed = run[1]["rows"]
    assert exact["report_bytes"] == exact["dense_bytes"]
    # The free space of the exact tier is less than a block of 64 tokens.
    assert exact["report_bytes"] <= dense["report_bytes"] < exact["report_bytes"] * (TOKENS + 64) / TOKENS
    assert packed["report_bytes"] < 0.4 * dense["report_bytes"]


def test_the_process_grows_by_what_the_cache_reports(run: tuple[str, dict[str, Any]]) -> None:
    for row in run[1]["rows"]:
        assert 0.75 * row["report_bytes"] < row["rss_growth"] < 1.25 * row["report_bytes"] + 2**20
        assert row["rss_growth"] <= row["rss_with_reserve"] <= row["rss_peak"]
        assert row["rss_once"] > 0


def test_ratios_are_those_of_the_growth(run: tuple[str, dict[str, Any]]) -> None:
    text, result = run
    exact, _, packed = result["rows"]
    for row in result["rows"]:
        assert row["ratio_to_exact"] == pytest.approx(exact["rss_growth"] / row["rss_growth"])
        assert f"{row['ratio_to_exact']:.2f}x" in text
    assert packed["ratio_to_exact"] > 2
    last = text.splitlines()[-1]
    assert last == result["sentence"]
    assert f"{TOKENS:,} tokens" in last
    assert OURS in last
    assert f"{packed['ratio_to_exact']:.2f}x less" in last


def test_help_has_an_example(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--help"])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "Example:" in printed
    assert "--tokens" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--specs", "dense", "hqmk:4"), ["unknown tier 'hqmk'", "did you mean 'hqmq'"]),
        (("--tokens", "0"), ["at least 1"]),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_measured(
    script: ModuleType,
    arguments: tuple[str, ...],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--json", str(tmp_path / "memory.json"), *arguments])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    for word in words:
        assert word in printed
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_filled_says_why(script: ModuleType) -> None:
    """The test causes an error by a shape that does not exist in the filling process."""
    sent: list[Any] = []
    channel = SimpleNamespace(send=sent.append)
    with pytest.raises(AttributeError):
        script.measure("dense", script.Shape(1, 4, 1, 8, "nosuch"), 10, channel)
    assert "nosuch" in sent[-1]
