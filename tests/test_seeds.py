"""A failing test prints its seed, and TESSERA_TEST_SEED changes the random numbers of every test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = """
import random
import numpy as np
import torch
from hypothesis import given, strategies as st

def test_draws():
    print("drawn", torch.rand(()).item(), np.random.rand(), random.random())
    assert False

def test_draws_too():
    print("drawn", torch.rand(()).item(), np.random.rand(), random.random())
    assert False

@given(st.integers(0, 10**9))
def test_draws_for_examples(n):
    print("example", n, torch.rand(()).item())
    assert n < 1000
"""


def run(folder: Path, seed: str | None, *chosen: str) -> str:
    """Return pytest's output without durations."""
    environment = {name: value for name, value in os.environ.items() if name != "TESSERA_TEST_SEED"}
    if seed is not None:
        environment["TESSERA_TEST_SEED"] = seed
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", "-rN", *(chosen or ("test_it.py",))]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False).stdout


def lines(output: str, word: str) -> list[str]:
    return [line for line in output.splitlines() if word in line]


def test_seeds_are_of_the_test_printed_and_changed_by_the_environment(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "test_it.py").write_text(TESTS, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    first, other = run(tmp_path, None), run(tmp_path, "1")
    drawn, examples = lines(first, "drawn"), lines(first, "example ")
    assert len(set(drawn)) == 2, first
    assert len(lines(first, "seed: ")) == 3
    assert examples
    # Every example starts with the test's seed.
    assert len({line.split()[-1] for line in examples}) == 1
    for word in ("drawn", "example ", "seed: "):
        assert not set(lines(other, word)) & set(lines(first, word))
    # A test draws the same numbers in every run, alone or with others.
    assert lines(run(tmp_path, None, "test_it.py::test_draws_too"), "drawn") == drawn[1:]
    assert "TESSERA_TEST_SEED=1" in other
