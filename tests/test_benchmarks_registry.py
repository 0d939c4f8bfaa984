"""Every benchmark script is registered under a name, and every result has a command."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"


@pytest.fixture(scope="module")
def run() -> Any:
    spec = importlib.util.spec_from_file_location("run", ROOT / "benchmarks" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["run"] = module
    spec.loader.exec_module(module)
    return module


def test_every_script_is_registered(run: Any) -> None:
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    named = {Path(each.command[0]).name for each in run.BENCHMARKS if each.command[0].startswith("benchmarks/")}
    assert named | set(run.HELPERS) == scripts
    assert not named & set(run.HELPERS)


def test_every_result_has_one_command_that_makes_it(run: Any) -> None:
    made = [name for each in run.BENCHMARKS for name in each.results]
    assert len(set(made)) == len(made)
    assert {path.relative_to(RESULTS).as_posix() for path in RESULTS.rglob("*.json")} <= set(made)


def test_commands_are_files_or_commands_of_tessera(run: Any) -> None:
    assert len({each.name for each in run.BENCHMARKS}) == len(run.BENCHMARKS)
    for each in run.BENCHMARKS:
        assert each.command[0] == "tessera" or (ROOT / each.command[0]).is_file()
        assert each.line(("--x",))[-1] == "--x"


def test_names_are_listed_with_what_they_need(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([]) == 0
    said = capsys.readouterr().out
    for each in run.BENCHMARKS:
        assert f"{each.name}: {each.measures}" in said
    assert "needs a CUDA device" in said


def test_a_name_runs_its_command_with_further_arguments(run: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert run.main(["codec-error", "--help"]) == 0
    assert "usage: codec_error.py" in capfd.readouterr().out
    assert run.main(["codec-error", "--no-such-option"]) == 2


def test_an_unknown_name_is_refused(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["nothing"])
    assert "there is no benchmark 'nothing'" in capsys.readouterr().err
