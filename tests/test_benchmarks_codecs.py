"""The benchmark of the codecs prints and writes its results, and computes its verdicts from them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "codec_error.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))
    import codec_error

    return codec_error


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Return the output and the JSON of a quick run."""
    path = tmp_path_factory.mktemp("results") / "new" / "codec_error.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stderr
    assert [p.name for p in path.parent.iterdir()] == ["codec_error.json"]
    return done.stdout, json.loads(path.read_text(encoding="utf-8"))


def test_every_codec_is_measured_on_every_input(run: tuple[str, dict[str, Any]], script: ModuleType) -> None:
    text, result = run
    found = {(row["spec"], row["head_dim"], row["inputs"]) for row in result["rows"]}
    assert len(found) == len(result["rows"])
    for members in script.FAMILIES.values():
        for spec in members:
            assert (spec in text) == (spec not in script.SLOW)
            for dim in (64, 128):
                for inputs in ("gaussian", "heavy-tailed", "giant-keys"):
                    assert ((spec, dim, inputs) in found) == (spec not in script.SLOW)
    assert result["seed"] == 0
    assert {"tessera", "torch", "python"} <= result["versions"].keys()


def test_bits_and_errors_are_those_of_the_codecs(run: tuple[str, dict[str, Any]]) -> None:
    text, result = run
    rows = {(row["spec"], row["head_dim"], row["inputs"]): row for row in result["rows"]}
    for key, bits, low, high in (
        (("hqmq:4", 128, "gaussian"), 4.0625, 0.0060, 0.0070),
        (("hqmq:3", 128, "heavy-tailed"), 3.0625, 0.022, 0.028),
        (("hqmq:4", 128, "giant-keys"), 4.3125, 0.0060, 0.0080),
        (("hqmq:s96_r4", 128, "gaussian"), 4.125, 0.0145, 0.0165),
        (("scalar:4", 64, "gaussian"), 4.25, 0.0083, 0.0097),
        (("q4_0", 64, "gaussian"), 4.5, 0.0065, 0.0085),
        (("int:4", 64, "giant-keys"), 4.25, 1.0, 100.0),
    ):
        assert rows[key]["bits"] == bits
        assert low < rows[key]["nmse"] < high
        assert f"{bits:.3f} · {rows[key]['nmse']:.5f}" in text


def test_bars_follow_from_the_rows(run: tuple[str, dict[str, Any]], script: ModuleType) -> None:
    text, result = run
    rows = [script.Row(**row) for row in result["rows"]]
    fixed, ratios = result["bars"][:2], result["bars"][2:]
    assert [(bar["limit"], bar["most_bits"]) for bar in fixed] == [(0.0075, 4.13), (0.0290, 3.13)]
    for bar, spec in zip(fixed, ("hqmq:4", "hqmq:3"), strict=True):
        (row,) = (r for r in rows if (r.spec, r.head_dim, r.inputs) == (spec, 128, "gaussian"))
        assert (bar["value"], bar["bits"]) == (row.nmse, row.bits)
        assert bar["holds"] == (row.nmse <= bar["limit"] and row.bits <= bar["most_bits"])
    assert len(ratios) == 6
    for bar in ratios:
        here = [r for r in rows if bar["name"].endswith(f"{r.inputs}, head_dim {r.head_dim}")]
        worst = max(
            min(r.nmse for r in here if r.codec == "HQMQ, Tessera" and r.bits <= b.bits) / b.nmse
            for b in here
            if not b.codec.startswith(("HQMQ, Tessera", "HQMQ, optimised")) and 3 <= b.bits <= 5
        )
        assert bar["value"] == pytest.approx(worst)
        assert bar["holds"] == (worst < 1)
    for bar in result["bars"]:
        assert bar["sentence"] in text.replace("\n", " ")
        assert ("NOT" in bar["sentence"]) != bar["holds"]


def test_a_bar_that_does_not_hold_is_reported(run: tuple[str, dict[str, Any]], script: ModuleType) -> None:
    rows = [script.Row(**row) for row in run[1]["rows"] if row["inputs"] == "gaussian" and row["head_dim"] == 128]
    assert all(bar.holds for bar in script.bars(rows))

    def changed(spec: str, **values: float) -> list[Any]:
        return [bar.holds for bar in script.bars([replace(r, **values) if r.spec == spec else r for r in rows])]

    assert changed("hqmq:4", nmse=0.0076) == [False, True, False]
    assert changed("hqmq:4", bits=4.14) == [False, True, False]
    assert changed("hqmq:3", nmse=0.0291) == [True, False, True]
    assert changed("kivi:2", nmse=0.03, bits=3.0) == [True, True, False]
    assert changed("fp8", nmse=1e-9) == [True, True, True]  # with more than five bits
    few = script.bars([r for r in rows if r.spec in ("hqmq:4", "kivi:2")])
    assert [bar.holds for bar in few] == [True, False]
    assert "nothing of hqmq has so few bits" in few[1].sentence


def test_help_gives_an_example(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["codec_error.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in ("Example:", "python benchmarks/codec_error.py", "--json", "--quick", "--inputs", "--seed"):
        assert word in text
