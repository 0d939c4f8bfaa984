"""Triton kernels compile for a GPU without spilling registers; kernels for CPUs are measured within an instruction set."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tessera.kernels import cpu

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_attention_compiles_for_a_gpu_and_keeps_to_registers_and_shared_memory(tmp_path: Path) -> None:
    path = tmp_path / "static.json"
    # Compiled again, not taken from the cache of an earlier run.
    env = {**os.environ, "PYTHONIOENCODING": "utf-8", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, str(BENCHMARKS / "triton_static.py"), "--codecs", "hqmq:k4v3", "int:4", "scalar:4"]
    command += ["--lookups", "held", "integers", "curve", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    found = [(row["spec"], row["lookup"]) for row in rows]
    assert found == [("hqmq:k4v3", "held"), ("scalar:4", "curve"), ("int:4", "integers")]
    for row in rows:
        assert 0 < row["registers"] <= 255
        assert row["spilled"] < 256
        assert 0 < row["shared"] < 99 * 1024  # the limit of the smallest GPUs with these tensor cores
        assert row["instructions"] > 1000


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_what_is_measured_on_a_gpu_runs_interpreted_without_an_error(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    env = {**os.environ, "PYTHONIOENCODING": "utf-8", "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(BENCHMARKS / "gpu_all.py"), "--smoke", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text(encoding="utf-8"))
    for part in ("correctness", "lookups", "encoding", "speed", "memories"):
        assert record[part]
        assert not [row for row in record[part] if "error" in row]
    measured = {(row["spec"], row["lookup"]) for row in record["lookups"]}
    assert {("dense", ""), ("hqmq:4", "held"), ("scalar:4", "curve"), ("int:4", "integers")} <= measured


@pytest.mark.skipif(cpu.MISSING is not None, reason=str(cpu.MISSING))
def test_encoding_is_measured_at_every_level(tmp_path: Path) -> None:
    path = tmp_path / "encode.json"
    command = [sys.executable, str(BENCHMARKS / "encode.py"), "--specs", "hqmq:2", "hqmq:s24_r2", "--others", "kivi:4"]
    command += ["--chunks", "256", "--few", "64", "--tokens", "8", "--repeats", "1", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["instructions"] == list(cpu.levels())
    joint, directions = record["search"]
    assert set(joint["nanoseconds"]) == {"brute force", "PyTorch", *cpu.levels()}
    assert set(directions["nanoseconds"]) == {"brute force", "PyTorch", cpu.levels()[-1]}
    assert joint["other_indices"] == directions["other_indices"] == 0
    assert [(row["spec"], row["shape"]) for row in record["whole"]] == [
        (spec, shape) for spec in ("hqmq:2", "hqmq:s24_r2", "kivi:4") for shape in ([1, 8, 8, 128], [1, 3, 64, 64])
    ]
    for row in record["whole"]:
        kinds = ("key", "value", *(["weighed key"] if row["spec"] == "hqmq:2" else []))
        assert set(row["nanoseconds"]) == {f"{kind}, {name}" for kind in kinds for name in ("PyTorch", *cpu.levels())}
    assert [row["spec"] for row in record["token"]] == ["hqmq:2", "hqmq:s24_r2"]


@pytest.mark.skipif("avx2" not in cpu.levels(), reason="there is no kernel for AVX2, or the processor lacks it")
def test_attention_within_avx2_is_measured_with_pytorch_restricted_as_well(tmp_path: Path) -> None:
    path = tmp_path / "decode.json"
    command = [sys.executable, str(BENCHMARKS / "decode_attention.py"), "--level", "avx2", "--codecs", "hqmq:4"]
    command += ["--tokens", "64", "--shapes", "4,2,32", "--repeats", "1", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["environment"]["pytorch"] == "AVX2"
    dense = [row["name"] for row in record["rows"] if row["dense"]]
    assert {name.partition(",")[0] for name in dense} == {"bfloat16", "float16", "float32"}
    assert record["rows"][0]["peer"] in dense


@pytest.mark.skipif(cpu.MISSING is not None, reason=str(cpu.MISSING))
def test_sparse_reading_is_measured_by_speed_and_by_planted_passages(tmp_path: Path) -> None:
    path = tmp_path / "sparse.json"
    path.write_text("{}")
    for part in ("speed", "needles"):
        command = [sys.executable, str(BENCHMARKS / "sparse_reading.py"), "--part", part, "--tokens", "8192", "--repeats", "1"]
        command += ["--draws", "2", "--json", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
        assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text(encoding="utf-8"))
    assert [row["tokens"] for row in record["speed"]] == [8192]
    kept = {(row["drift"], row["passage"]): row["kept"] for row in record["needles"]}
    assert kept[0.0, 1] > 0.9  # the width of its block reveals it
    assert kept[1.0, 1] < kept[1.0, 32]
    assert kept[1.0, 32] > 0.7
