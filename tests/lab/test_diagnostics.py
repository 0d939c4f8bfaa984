"""Every plan of the diagnostics runs, resumes, is reported and drawn, and a memory learns tasks that need one."""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("accelerate", reason="the extra lab is not installed")

from tessera.cli import app
from tessera.lab.evaluation import diagnostics as plans
from tessera.lab.evaluation.diagnostics_plot import STYLES, plot_diagnostics
from tessera.lab.models.backbones import KINDS, BackboneConfig, build_backbone
from tessera.lab.tasks.binding import Binding
from tessera.lab.training import diagnostics_training as training
from tessera.lab.training.diagnostics_training import DiagnosticConfig, train_diagnostic
from tessera.lab.training.optimizers import make_optimizers
from tessera.tensor_memory import TensorMemoryConfig


def run(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["eval", "diagnostics", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make measurements use few sequences."""
    monkeypatch.setattr(training, "MEASURED", 8)


def row(task: str, fields: dict[str, Any], kind: str, accuracy: float, **more: Any) -> dict[str, Any]:
    bounds = {"accuracy": accuracy, "chance": 0.25, "stateless": 0.25, "ceiling": 1.0}
    gates = [0.25, 0.5] if kind == "memory" else []
    return {**plans.job(task, fields, kind), **bounds, "gates": gates, **more}


def test_every_run_of_every_plan_can_be_and_is_there_once() -> None:
    full = plans.full_plan(2)
    assert len({plans.key(job) for job in full}) == len(full)
    for job in (*full, *plans.quick_plan(), *plans.default_plan()):
        config = plans.config_of(job)
        assert plans.title(job)
        assert config.steps == job["steps"]
    for name, fields, _ in plans.MENDED:
        task = plans.TASKS[name](**fields)
        assert task.stateless == pytest.approx(task.chance)
        assert task.ceiling == 1
    settings = {
        plans.config_of(job).backbone.memory for job in full if job["task"] == "binding" and job["attention"] == "frame"
    }
    assert len(settings) == len(plans.SETTINGS) + len(plans.ABLATIONS)
    assert set(STYLES) == set(KINDS)


def test_a_memory_learns_what_attention_to_the_current_token_cannot(tmp_path: Path) -> None:
    found = {}
    for job in plans.quick_plan():
        if job["task"] == "binding":
            config = replace(plans.config_of(job), steps=100)
            found[job["kind"]] = train_diagnostic(config, tmp_path / job["kind"], show=False)[1]
    assert found["plain"]["accuracy"] < 0.3
    assert found["memory"]["accuracy"] > 0.9
    assert found["plain"]["gates"] == []
    assert len(found["memory"]["gates"]) == 2


def test_the_gates_of_a_grid_learn_at_the_rate_of_weights() -> None:
    model = build_backbone(
        BackboneConfig(5, 2, width=16, heads=2, hidden=16, memory=TensorMemoryConfig(channels=4, grid=(2, 2)))
    )
    assert model.memory is not None
    optimizers = make_optimizers(model, muon_lr=1.0, adamw_lr=2.0, gate_lr=3.0, weight_decay=0.0)
    rates = {id(p): group["lr"] for o in optimizers for group in o.param_groups for p in group["params"]}
    assert rates[id(model.memory.gates_weight)] == 1
    assert rates[id(model.layers[0].memory_logit)] == 3
    assert set(rates) == {id(p) for p in model.parameters()}


@pytest.mark.usefixtures("few")
def test_they_are_measured_drawn_and_saved_and_go_on(tmp_path: Path) -> None:
    words = ("--quick", "--steps", 1, "--jobs", 1, "--out", tmp_path)
    code, out, _ = run(*words, "--tasks", "binding")
    assert code == 0
    path = tmp_path / "diagnostics.json"
    rows = json.loads(path.read_text())["rows"]
    assert [(r["task"], r["kind"]) for r in rows] == [("binding", "plain"), ("binding", "memory")]
    assert all(f"{r['accuracy']:.3f}" in out for r in rows)
    assert (tmp_path / "diagnostics.png").read_bytes().startswith(b"\x89PNG")
    assert run(*words, "--tasks", "binding", "no harm", "--kinds", "plain")[0] == 0
    again = json.loads(path.read_text())["rows"]
    assert again[:2] == rows
    assert [(r["task"], r["kind"]) for r in again[2:]] == [("no harm", "plain")]
    recorded = json.loads((Path(__file__).parents[2] / "docs" / "results" / "diagnostics.json").read_text())
    assert rows[0].keys() == {*recorded["rows"][0], "rate"}


def test_the_benchmark_draws_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    benchmark = importlib.import_module("diagnostics")
    saved, picture = tmp_path / "diagnostics.json", tmp_path / "diagnostics.png"
    saved.write_text(json.dumps({"rows": [row("binding", {}, "memory", 0.5, steps=300)]}))
    monkeypatch.setattr(sys, "argv", ["diagnostics.py", "--draw", "--json", str(saved), "--plot", str(picture)])
    assert benchmark.main() == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_tables_have_mean_and_spread_and_settings_beside_each_other(tmp_path: Path) -> None:
    rows = [
        row("binding", {}, "plain", 0.25, seed=0),
        row("binding", {}, "memory", 0.5, seed=0),
        row("binding", {}, "memory", 0.75, seed=1),
        row("binding", {}, "memory", 0.3, setting="the paper's"),
        row("binding", {"delay": 16}, "memory", 0.4),
        row("map", {}, "wide", 0.6),
    ]
    header, lines = plans.cells(rows)
    assert header[1:5] == KINDS
    name = "binding, 20 pairs, noise 0.05"
    assert lines[0] == (name, "0.250", "", "", "0.625 ± 0.177", "1.000", "0.250", "0.250")
    assert [line[0] for line in lines[1:]] == [f"{name}, delay 16", "map, 16 glimpses, seen cells"]
    header, lines = plans.setting_cells(rows)
    assert header == ("setting", name)
    assert lines == [("default", "0.625 ± 0.177"), ("the paper's", "0.300")]
    header, lines = plans.gate_cells(rows)
    assert header == ("task", "layer 1", "layer 2", "at the start")
    assert lines[0] == (name, "0.250 ± 0.000", "0.500 ± 0.000", "0.119")
    assert len(plans.diagnostics_tables(rows)) == 3
    assert len(plans.diagnostics_tables(rows[:1])) == 1
    later = row("binding", {"delay": 64}, "memory", 0.9, delays=[0, 1024], by_delay={"0": 0.95, "1024": 0.5})
    assert plans.delay_cells([*rows, later]) == (
        ("task", "setting", "0 blank", "1,024 blank", "guessing"),
        [(name, "default", "0.950", "0.500", "0.250")],
    )
    assert len(plans.delay_cells([later, {**later, "setting": "the paper's"}])[1]) == 2
    assert (plans.cells([*rows, later]), plans.setting_cells([*rows, later])) == (plans.cells(rows), plans.setting_cells(rows))
    assert len(plans.diagnostics_tables([*rows, later])) == 4
    plot_diagnostics([*rows, later], tmp_path / "all.png")
    plot_diagnostics(rows[:2], tmp_path / "few.png")
    from matplotlib.image import imread

    assert imread(tmp_path / "all.png").shape[0] > 1.5 * imread(tmp_path / "few.png").shape[0]
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_diagnostics([], tmp_path / "none.png")


def test_runs_of_other_lengths_are_not_averaged() -> None:
    rows = [row("map", {}, "memory", 0.6), row("map", {}, "memory", 0.8, steps=1000)]
    assert [line[4] for line in plans.cells(rows)[1]] == ["0.600", "0.800"]
    rows += [
        row("map", {}, "memory", 0.5, setting="every cell"),
        row("map", {}, "memory", 0.9, setting="every cell", steps=1000),
    ]
    assert plans.setting_cells(rows)[1] == [
        ("default, 300 steps", "0.600"),
        ("default, 1,000 steps", "0.800"),
        ("every cell, 300 steps", "0.500"),
        ("every cell, 1,000 steps", "0.900"),
    ]


def test_delays_of_runs_of_other_lengths_or_other_delays_stand_apart() -> None:
    short = row("map", {"delay": 4}, "memory", 0.2, delays=[0, 4], by_delay={"0": 0.2, "4": 0.3})
    long = row("map", {"delay": 4}, "memory", 0.9, steps=1000, delays=[0, 16], by_delay={"0": 0.9, "16": 0.8})
    header, lines = plans.delay_cells([short, long])
    assert header[2:] == ("0 blank", "4 blank", "16 blank", "guessing")
    assert [line[2:5] for line in lines] == [("0.200", "0.300", ""), ("0.900", "", "0.800")]
    assert lines[1][0].endswith("1,000 steps")


def test_an_anchored_memory_is_told_the_places_that_tokens_say() -> None:
    config = plans.config_of(plans.job("map", {"queries": 2}, "memory", "anchored"))
    model, asked = build_backbone(config.backbone), []
    assert model.memory is not None
    model.memory.register_forward_pre_hook(lambda _, arguments: asked.append(arguments[2]))
    x, _ = config.task.sample(3)
    model(x)
    assert len(asked) == config.backbone.layers
    torch.testing.assert_close(asked[0], x[..., 3:5])


def test_measuring_in_parts_is_measuring_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Binding(pairs=3, values=4)
    model = build_backbone(BackboneConfig(task.features, task.classes, "plain", width=16, heads=2, hidden=16))
    once = training.measure(model, task)
    monkeypatch.setattr(training, "FORWARD_TOKENS", 7 * task.length)
    assert training.measure(model, task) == pytest.approx(once)
    x, targets = task.sample(training.MEASURED, torch.Generator().manual_seed(10**6))
    with torch.no_grad():
        assert training.accuracy(model(x).logits, targets) == pytest.approx(once)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "maps"], "no task 'maps'; there are occlusion, map, binding, no harm"),
        (["--kinds", "thin"], "no kind 'thin'; there are plain, wide, slots, memory"),
        (["--quick", "--full"], "not both"),
        (["--quick", "--tasks", "map"], "nothing to measure"),
        (["--out", "{tmp}/file"], "--out must be a folder"),
        (["--out", "{tmp}/other"], "holds no results of diagnostics"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "diagnostics.json").write_text("[]")
    given = [word.format(tmp=tmp_path) for word in words]
    code, _, err = run(*given, *(() if "--out" in given else ("--out", tmp_path / "out")))
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_measured_with_delays_learns_from_all_up_to_the_longest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[int] = []
    sample = Binding.sample

    def watch(task: Binding, batch: int, generator: Any = None) -> Any:
        drawn.append(task.delay)
        return sample(task, batch, generator)

    monkeypatch.setattr(training, "MEASURED", 4)
    monkeypatch.setattr(Binding, "sample", watch)
    fields = {"pairs": 1, "values": 2, "queries": 1, "delay": 3}
    for delays, learned in (((0, 3, 9), {0, 1, 2, 3}), ((), {3})):
        drawn.clear()
        config = replace(plans.config_of(plans.job("binding", fields, steps=25, delays=delays)), batch=2)
        training.train_diagnostic(config, tmp_path / str(len(delays)), show=False)
        assert set(drawn[:25]) == learned


def test_a_model_is_measured_with_other_delays_than_it_was_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "MEASURED", 64)
    fields = {"pairs": 1, "values": 2, "queries": 1, "delay": 2}
    config = replace(plans.config_of(plans.job("binding", fields, steps=1, delays=(0, 2, 9))), batch=2)
    with tempfile.TemporaryDirectory() as folder:
        model, found = train_diagnostic(config, Path(folder), show=False)
    assert list(found["by_delay"]) == ["0", "2", "9"]
    for delay, accuracy in found["by_delay"].items():
        assert accuracy == training.measure(model, replace(config.task, delay=int(delay)), 16)
    assert plans.key(plans.job("binding", fields, delays=(0, 2))) != plans.key(plans.job("binding", fields))


def test_a_job_of_nothing_that_is_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no setting 'fast'"):
        plans.diagnostics([plans.job("map", {}, setting="fast")], tmp_path / "x.json")
    task = Binding()
    with pytest.raises(ValueError, match="the backbone has features 4, and the task 38"):
        DiagnosticConfig(task, BackboneConfig(4, task.classes))
