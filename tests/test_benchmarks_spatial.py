"""The benchmarks of the Tensor Memory measure what they say."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tessera.spatial import TensorMemoryConfig

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_the_paper_forgets_at_once_and_the_default_does_not(benchmark: Any) -> None:
    retention = benchmark("retention")
    lags = (8, 32, 128)
    paper = retention.gradients(TensorMemoryConfig.paper(), lags, 1, batch=4)
    ours = retention.gradients(TensorMemoryConfig(), lags, 1, batch=4)
    assert paper[1] < 1e-5
    assert paper[2] < 1e-12
    assert all(share > 0.1 for share in ours)
    recovered = retention.recovered(TensorMemoryConfig(), (1, 8), 1, sequences=192)
    assert 0.2 < recovered[1] < recovered[0] <= 1
    assert retention.recovered(TensorMemoryConfig.paper(), (8,), 1, sequences=192)[0] < 0.1


def test_a_write_is_read_a_thousand_steps_later_if_nothing_covers_it(benchmark: Any) -> None:
    """The footprint keeps what is elsewhere: with a narrow one, cells that no other token meets are exact for ever."""
    import torch

    from tessera.spatial import TensorMemory, TensorMemoryState

    memory = TensorMemory(TensorMemoryConfig(channels=4, grid=(12, 12), sigma_init=0.1, anchored=True), 8)
    with torch.no_grad():
        memory.sigma_net.weight.zero_()
        x = torch.randn(1, 1025, 8)
        places = torch.rand(1, 1025, 2) - 1  # one quarter of the plane,
        places[:, :1] = 0.8  # the first token in another
        _, first = memory(x[:, :1], None, places[:, :1])
        _, last = memory(x[:, 1:], TensorMemoryState(first.h, first.c, first.waiting, first.places), places[:, 1:])
    assert first.h[..., 8:, 8:].any()
    assert torch.equal(last.h[..., 8:, 8:], first.h[..., 8:, 8:])


def test_the_cost_of_every_form_is_written(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cost = benchmark("tensor_memory_cost")
    monkeypatch.setattr(cost, "SIZES", ((1, 8, 12, {"channels": 4, "grid": (3, 3), "chunk": 2}),))
    path = tmp_path / "cost.json"
    monkeypatch.setattr(sys, "argv", ["tensor_memory_cost.py", "--repeats", "1", "--json", str(path)])
    assert cost.main() == 0
    rows = json.loads(path.read_text())["rows"]
    assert {(r["setting"], r["form"], r["way"]) for r in rows} == {
        (s, f, w) for s in cost.SETTINGS for f in cost.forms() for w in ("forward", "backward")
    }
    assert all(r["times"] == 1 for r in rows if r["form"] == cost.PLAIN)
