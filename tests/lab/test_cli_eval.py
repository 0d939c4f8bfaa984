"""Each command of `tessera eval` runs end to end with small settings, and reports bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("accelerate", reason="the extra lab is not installed")

from tessera.cli import app
from tessera.lab.evaluation import recall
from tessera.lab.evaluation.capacity import SETTINGS, capacity, plot_capacity, recalled
from tessera.lab.evaluation.language_plot import plot_language
from tessera.lab.evaluation.long_streams import length
from tessera.lab.evaluation.recall_plot import STYLES, plot_recall
from tessera.lab.training import recall_training as training


def run(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["eval", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make measurements use few sequences."""
    monkeypatch.setattr(training, "MEASURED", 8)
    monkeypatch.setattr(training, "PART", 4)


def test_few_pairs_are_recalled_and_many_are_not() -> None:
    assert recalled("outer", 1.0, 1.0, 64, 8, 4, 0) == 1.0
    assert recalled("outer", 1.0, 1.0, 16, 256, 4, 0) < 0.2
    # A matrix with full decay recalls only the last pair.
    assert recalled("outer", 1e-6, 0.5, 64, 8, 4, 0) < 0.5


def test_capacity_is_measured_drawn_and_saved(tmp_path: Path) -> None:
    code, out, _ = run("capacity", "--widths", 8, 16, "--trials", 2, "--out", tmp_path)
    assert code == 0
    rows = json.loads((tmp_path / "capacity.json").read_text())["rows"]
    assert {row["dim"] for row in rows} == {8, 16}
    assert {row["setting"] for row in rows} == set(SETTINGS)
    assert all(f"{row['recalled']:.2f}" in out for row in rows)
    assert is_picture(tmp_path / "capacity.png")
    assert [row for part in capacity((8, 16), 2) for row in part] == rows


@pytest.mark.usefixtures("few")
def test_recall_is_measured_drawn_and_saved_and_goes_on(tmp_path: Path) -> None:
    words = ("recall", "--pairs", 2, "--gap", 8, "--dim", 16, "--steps", 2, "--jobs", 1, "--out", tmp_path)
    code, out, _ = run(*words, "--methods", "dense", "Tensor Cache, delta")
    assert code == 0
    path = tmp_path / "recall.json"
    rows = json.loads(path.read_text())["rows"]
    assert [row["method"] for row in rows] == ["dense", "Tensor Cache, delta"]
    for row in rows:
        assert set(row["by_gap"]) == {"0", "4", "8", "16", "32"}
        assert row["accuracy"] == row["by_gap"]["8"]
        assert f"{row['accuracy']:.3f}" in out
    assert is_picture(tmp_path / "recall.png")
    assert run(*words, "--methods", "dense", "window")[0] == 0
    again = json.loads(path.read_text())["rows"]
    assert again[:2] == rows
    assert [row["method"] for row in again[2:]] == ["window"]


@pytest.mark.usefixtures("few")
def test_a_row_of_the_full_plan_has_what_the_tables_need(tmp_path: Path) -> None:
    job = {"pairs": 4, "dim": 16, "rewrites": 2, "steps": 2, "method": "Tensor Cache, the paper's setting", "seed": 0}
    *_, (row,) = recall.recall([job], tmp_path / "recall.json")
    recorded = json.loads((Path(__file__).parents[2] / "docs" / "results" / "recall.json").read_text())
    assert row.keys() == recorded["rows"][0].keys()
    assert row["by_gap"].keys() == recorded["rows"][0]["by_gap"].keys()
    assert json.loads((tmp_path / "recall.json").read_text()).keys() == recorded.keys()


def test_what_is_kept_is_counted() -> None:
    def kept(method: str, length: int) -> int:
        job = {"pairs": 16, "dim": 64, "rewrites": 0, "steps": 1, "method": method, "seed": 0}
        return training.state_bytes(recall.config_of(job), length)

    pair, matrix = 2 * 64 * 4, 64 * 64 * 4
    assert kept("window", 10_000) == 2 * 2 * 16 * pair
    assert kept("window + sinks", 10_000) == 2 * 2 * 20 * pair
    assert kept("window", 10) == 2 * 2 * 10 * pair
    assert kept("dense", 100) == 2 * 2 * 100 * pair
    assert kept("Tensor Cache, outer", 10_000) == 2 * 2 * (16 * pair + matrix)
    assert kept("Infini-attention", 10_000) == 2 * 2 * (16 * pair + matrix + 64 * 4)


def test_plans_name_every_run_once() -> None:
    jobs = recall.full_plan(3, 600)
    assert len({recall.key(job) for job in jobs}) == len(jobs)
    for method in recall.METHODS:
        assert len([j for j in jobs if (j["method"], j["pairs"], j["dim"], j["rewrites"]) == (method, 16, 64, 0)]) == 3
    assert set(STYLES) == set(recall.METHODS)
    quick = recall.quick_plan(seeds=2)
    assert {recall.key(job) for job in quick}.isdisjoint(map(recall.key, jobs))
    assert all(recall.config_of(job).task.gap > 2 * recall.WINDOW for job in (*quick, *jobs))


def test_pictures_show_what_was_varied(tmp_path: Path) -> None:
    def row(pairs: int, dim: int, method: str) -> dict[str, Any]:
        job = {"pairs": pairs, "dim": dim, "rewrites": 0, "steps": 1, "method": method, "seed": 0}
        return {**job, "accuracy": 0.5, "by_gap": {"0": 0.4, "64": 0.5}, "chance": 0.1, "state_bytes": 4096}

    base = [row(16, 64, method) for method in STYLES]
    plot_recall(base, tmp_path / "few.png")
    plot_recall([*base, row(32, 64, "dense"), row(16, 32, "dense")], tmp_path / "all.png")
    from matplotlib.image import imread

    few, every = imread(tmp_path / "few.png"), imread(tmp_path / "all.png")
    assert every.shape[0] > 1.5 * few.shape[0]
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_recall([], tmp_path / "none.png")
    plot_capacity(
        [{"dim": 8, "pairs": n, "setting": s, "recalled": 0.5} for n in (2, 4) for s in SETTINGS], tmp_path / "one.png"
    )
    assert is_picture(tmp_path / "one.png")


def test_language_is_measured_behind_the_window(tmp_path: Path) -> None:
    code, out, _ = run("language", "--tokens", 1100, "--windows", 1, "--out", tmp_path)
    assert code == 0
    record = json.loads((tmp_path / "language_memory.json").read_text())
    assert record["edges"] == [1, 256, 512, 1024, 1100]
    rows = {row["name"]: row for row in record["rows"]}
    assert f"{rows['dense']['beyond']:.4f}" in out
    assert rows["with the Tensor Cache"]["losses"][0] == pytest.approx(rows["window + sinks"]["losses"][0], abs=1e-3)
    assert rows["its reads switched off"]["beyond"] == pytest.approx(rows["window + sinks"]["beyond"], abs=1e-3)
    assert rows["with the Tensor Cache"]["beyond"] != pytest.approx(rows["window + sinks"]["beyond"], abs=1e-3)
    recorded = json.loads((Path(__file__).parents[2] / "docs" / "results" / "language_memory.json").read_text())
    assert record.keys() == recorded.keys()
    assert is_picture(tmp_path / "language_memory.png")
    with pytest.raises(ValueError, match="no row is 'dense', only window"):
        plot_language([{"name": "window", "losses": [1.0]}], (1, 2), tmp_path / "none.png")


def test_bounded_streams_do_not_grow(tmp_path: Path) -> None:
    specs = ("dense", "sink:2 + window:32 + tc")
    code, out, _ = run("streams", "--specs", *specs, "--tokens", 2048, "--dense", 1024, "--out", tmp_path)
    assert code == 0
    rows = json.loads((tmp_path / "streams.json").read_text())["stream"]
    assert [(row["spec"], row["tokens"]) for row in rows] == [("dense", 1024), (specs[1], 1024), (specs[1], 2048)]
    assert rows[1]["nbytes"] == rows[2]["nbytes"] < rows[0]["nbytes"]
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert specs[1] in out
    assert [length(n) for n in (1, 1024, 1025, 5000)] == [1024, 1024, 2048, 8192]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recall", "--methods", "sparse"], "no method 'sparse'; there are dense"),
        (["recall", "--pairs", "0"], "pairs must lie between 1"),
        (["recall", "--out", "{tmp}/file"], "--out must be a folder"),
        (["recall", "--out", "{tmp}/other"], "holds no results of recall"),
        (["capacity", "--widths", "2"], "a width must be at least 4"),
        (["capacity", "--trials", "0"], "a trial at least"),
        (["language", "--tokens", "512"], "more than four windows"),
        (["language", "--tokens", "5000"], "longer than the 2048"),
        (["language", "--model", "{small}"], "has no memory"),
        (["language", "--memory", "{tmp}/nothing"], "there is no memory"),
        (["streams", "--specs", "windw:8"], "did you mean 'window'"),
        (["streams", "--tokens", "5"], "tokens"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(words: list[str], message: str, small_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "recall.json").write_text("[]")
    given = [word.format(tmp=tmp_path, small=small_model) for word in words]
    code, _, err = run(*given, *(() if "--out" in given else ("--out", tmp_path / "out")))
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()
