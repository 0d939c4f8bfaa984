"""A test that hangs fails, prints its stack, and does not block the others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("xdist")

TESTS = """
import time

def test_stands_still():
    while True:
        time.sleep(1)

def test_passes():
    pass
"""
SETTINGS = "[pytest]\nfaulthandler_timeout = 4\nfaulthandler_exit_on_timeout = true\n"


def test_a_test_that_stands_still_fails_and_says_where(tmp_path: Path) -> None:
    for name, text in {"test_it.py": TESTS, "pytest.ini": SETTINGS}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "1 failed, 1 passed" in said.stdout, said.stdout
    assert "in test_stands_still" in said.stderr, said.stderr


def test_these_tests_run_under_that_rule(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("faulthandler_exit_on_timeout")
    assert float(pytestconfig.getini("faulthandler_timeout")) > 0
