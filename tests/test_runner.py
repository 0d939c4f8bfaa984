"""What the tests do when a worker ends in the middle of one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("xdist")

TESTS = """
import os, time
from pathlib import Path

def test_ends_once():
    if not Path("seen").exists():
        Path("seen").touch()
        os._exit(1)

def test_stands_still():
    while True:
        time.sleep(1)

def test_passes():
    pass
"""
SETTINGS = "[pytest]\nfaulthandler_timeout = 4\nfaulthandler_exit_on_timeout = true\n"


def test_a_test_whose_worker_ended_is_run_once_more_and_both_are_said(tmp_path: Path) -> None:
    conftest = (Path(__file__).parent / "conftest.py").read_text(encoding="utf-8")
    for name, text in {"conftest.py": conftest, "test_it.py": TESTS, "pytest.ini": SETTINGS}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "1 failed, 2 passed, 2 rerun" in said.stdout, said.stdout
    assert "in test_stands_still" in said.stderr, said.stderr
