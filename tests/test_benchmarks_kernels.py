"""The benchmark that compiles the Triton kernels: they compile for a GPU, and stay in its registers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "triton_static.py"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_attention_compiles_for_a_gpu_and_keeps_to_registers_and_shared_memory(tmp_path: Path) -> None:
    path = tmp_path / "static.json"
    # Compiled anew, not taken from what an earlier run left.
    env = {**os.environ, "PYTHONIOENCODING": "utf-8", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, str(SCRIPT), "--cases", "2", "--lookups", "held", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [(row["spec"], row["rows"], row["lookup"]) for row in rows] == [("hqmq:4", 16, "held"), ("hqmq:4", 32, "held")]
    for row in rows:
        assert 0 < row["registers"] <= 255
        assert row["spilled"] < 256
        assert 0 < row["shared"] < 99 * 1024  # of the smallest GPUs with such tensor cores
        assert row["instructions"] > 1000
