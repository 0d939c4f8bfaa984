"""A memory that two processes train, each on half of every batch, learns what one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("torch.distributed.fsdp", reason="PyTorch was built without its distributed part")

PROCESS = Path(__file__).with_name("training_process.py")
LEAVE = Path(__file__).parents[1] / "run_and_leave.py"


def run(kind: str, how: str, out: Path, processes: int) -> None:
    spread = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)) if processes > 1 else ()
    command = (sys.executable, *spread, str(LEAVE), str(PROCESS), kind, how, str(out))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module", params=["tc", "tm"])
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Return the kind of memory, and the folder with the result of one process."""
    out = tmp_path_factory.mktemp("out")
    run(request.param, "one", out, 1)
    return request.param, out


def read(out: Path, name: str) -> tuple[list[float], dict[str, Any]]:
    return json.loads((out / f"{name}.json").read_text(encoding="utf-8")), load_file(out / f"{name}.safetensors")


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_have_the_loss_curve_and_the_memory_of_one(alone: tuple[str, Path], how: str) -> None:
    kind, out = alone
    run(kind, how, out, 2)
    curve, memory = read(out, f"{kind}_one0")
    assert curve[-1] < curve[0] - 0.02
    for rank in (0, 1):
        losses, learned = read(out, f"{kind}_{how}{rank}")
        assert losses == pytest.approx(curve, abs=1e-4)
        assert learned.keys() == memory.keys()
        for name, tensor in memory.items():
            torch.testing.assert_close(learned[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
