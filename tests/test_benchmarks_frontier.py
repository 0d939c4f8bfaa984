"""The frontier benchmark repeats the right passages, writes its results, and resumes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tessera.evaluation import load
from tessera.models import heldout_text

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "frontier.py"
LENGTH = 768


@pytest.fixture(scope="module")
def frontier() -> Any:
    sys.path.insert(0, str(SCRIPT.parent))
    import frontier

    return frontier


def test_passages_are_of_the_text_that_was_read_and_lie_at_all_depths(frontier: Any) -> None:
    for length in (512, 2048, 16384):
        begin = frontier.passages(length)
        text = length - len(begin) * frontier.PASSAGE
        assert len(begin) == length // frontier.SPACE
        assert 0 <= begin.min() < text / len(begin)
        assert text - text / len(begin) < begin.max() + frontier.PASSAGE <= text
        assert (begin.sort().values.diff() >= frontier.PASSAGE).all()


def test_recall_is_of_the_second_reading(frontier: Any) -> None:
    bench = frontier.Bench(load(), None, heldout_text(), 256)
    ids, begin = bench._ids(LENGTH), frontier.passages(LENGTH)
    text = LENGTH - len(begin) * frontier.PASSAGE
    for number, first in enumerate(begin.tolist()):
        again = text + number * frontier.PASSAGE
        assert torch.equal(ids[again : again + frontier.PASSAGE], ids[first : first + frontier.PASSAGE])
    job = {"model": "demo model", "length": LENGTH, "spec": "dense", "kind": "exact"}
    exact, short = bench.run(job), bench.run({**job, "spec": "window:64"})
    assert (exact["loss"], exact["error"]) == (0, 0)
    assert short["loss"] > 0
    assert short["first"] == exact["first"] <= exact["recall"]
    assert short["recall"] < exact["recall"]
    assert short["nbytes"] < exact["nbytes"]


def test_a_cut_run_goes_on_and_is_drawn(frontier: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, picture = tmp_path / "new" / "frontier.json", tmp_path / "frontier.png"
    specs = {"dense": "exact", "sink:4 + hqmq:4 + recent:128": "codec", "sink:4 + window:64": "window"}
    monkeypatch.setattr(frontier, "policies", lambda *_: dict(list(specs.items())[:2]))
    monkeypatch.setattr(sys, "argv", ["frontier", "--lengths", "512", "--json", str(path), "--picture", str(picture)])
    assert frontier.main() == 0
    before = json.loads(path.read_text())["rows"]
    monkeypatch.setattr(frontier, "policies", lambda *_: specs)
    assert frontier.main() == 0
    after = json.loads(path.read_text())["rows"]
    assert [row["spec"] for row in after] == list(specs)
    assert after[:2] == before
    assert picture.stat().st_size > 10_000
