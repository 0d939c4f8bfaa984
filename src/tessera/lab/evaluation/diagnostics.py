"""Diagnostics: small backbones trained from scratch on tasks that require a memory.

Every row is one model: a task, a kind of backbone, the range of its attention, and the setting of the memory. If attention sees
the current token only, the memory is the only way to keep information; with whole attention, as in the original tasks,
attention may suffice.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.table import Table

from tessera.lab.evaluation.jobs import Job, Row, resume
from tessera.lab.models.backbones import KINDS, OPEN_AT_FIRST, BackboneConfig
from tessera.lab.tasks.binding import Binding
from tessera.lab.tasks.map_building import MapBuilding
from tessera.lab.tasks.no_harm import NoHarm
from tessera.lab.tasks.occlusion import Occlusion
from tessera.lab.training.diagnostics_training import DiagnosticConfig, train_diagnostic
from tessera.tensor_memory import TensorMemoryConfig

TASKS: dict[str, type[Any]] = {"occlusion": Occlusion, "map": MapBuilding, "binding": Binding, "no harm": NoHarm}
"""Name -> the task."""

GRIDS: dict[str, dict[str, Any]] = {
    "occlusion": {"channels": 32, "grid": (4, 4, 4)},
    "map": {"channels": 16, "grid": (8, 8)},
    "binding": {"channels": 32, "grid": (6, 6, 6)},
    "no harm": {"channels": 32, "grid": (4, 4)},
}
"""Grid of the memory by task, with as many axes as places have."""

SETTINGS: dict[str, tuple[bool, dict[str, Any]]] = {
    "default": (False, {}),
    "every cell": (False, {"update": "all"}),
    "gates from the input": (False, {"gates": "input"}),
    "every cell, gates from the input": (False, {"update": "all", "gates": "input"}),
    "anchored": (False, {"anchored": True}),
    "chunks of 4": (False, {"chunk": 4}),
    "chunks of 4, one read": (False, {"chunk": 4, "read": "chunk"}),
    "the paper's": (True, {}),
    "the paper's, forget bias 3": (True, {"forget_bias": 3.0}),
    "the paper's, sigma 0.3": (True, {"sigma_init": 0.3}),
    "the paper's, footprint": (True, {"update": "footprint"}),
    "the paper's, places agree": (True, {"coordinates": "agree"}),
    "the paper's, light projection": (True, {"projection": "light"}),
    "the paper's, gates from the input": (True, {"gates": "input"}),
}
"""Name -> whether it starts from the paper's setting, and the changes: each of our improvements alone."""

ABLATIONS: dict[str, tuple[bool, dict[str, Any]]] = {
    "nearest cell": (False, {"write": "nearest"}),
    "shared net of places": (False, {"coordinates": "shared"}),
    "separate nets of places": (False, {"coordinates": "separate"}),
    "pointwise convolution": (False, {"convolution": "pointwise"}),
    "grid 4x4x4": (False, {"grid": (4, 4, 4)}),
    "grid 8x8x8": (False, {"grid": (8, 8, 8)}),
    "chunks of 2": (False, {"chunk": 2}),
    "sigma 1.31": (False, {"sigma_init": TensorMemoryConfig.paper().sigma_init}),
    "forget bias 0": (False, {"forget_bias": 0.0}),
    "full projection": (False, {"projection": "full"}),
}
"""The paper's ablations, on binding, of the default, and ours: one choice changed."""

DELAY, DELAYS = 64, (0, 64, 256, 1024)
"""Numbers of blank tokens before the question: the maximum in training, and those of the measurements."""

_ASKED = {"last": "in the middle", "hidden": "asked while hidden", "back": "asked when back"}

ALONE = "frame"
"""Attention to the current frame only."""


def job(
    task: str,
    fields: dict[str, Any],
    kind: str = "memory",
    setting: str = "default",
    *,
    attention: str = ALONE,
    steps: int = 300,
    seed: int = 0,
    delays: Sequence[int] = (),
) -> Job:
    """Make a job; `fields` are the task's, and the model is also measured with `delays`."""
    return {
        "task": task,
        "fields": fields,
        "attention": attention,
        "kind": kind,
        "setting": setting,
        "steps": steps,
        "seed": seed,
        **({"delays": list(delays)} if delays else {}),
    }


MENDED: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("occlusion", {"patch": 16}, 1),
    ("occlusion", {"patch": 16, "ask": "back"}, 2),
    ("map", {"queries": 16}, 1),
    ("binding", {}, 1),
    ("no harm", {"rule": "given", "symbols": 8, "steps": 16}, 1),
)
"""The tasks that require a memory, in the sizes of the plans, and the multiple of a plan's steps that each takes."""


def quick_plan(kinds: Sequence[str] = ("plain", "memory"), seeds: int = 1, steps: int = 80) -> list[Job]:
    """Return two tasks so small that they are learned in seconds."""
    small: tuple[tuple[str, dict[str, Any]], ...] = (
        ("binding", {"pairs": 1, "noise": 0.0, "values": 8, "queries": 4}),
        ("no harm", {"symbols": 8, "steps": 4}),
    )
    return [
        {**job(task, fields, kind, steps=steps, seed=seed), "rate": 3.0}
        for seed in range(seeds)
        for task, fields in small
        for kind in kinds
    ]


def default_plan(
    tasks: Sequence[str] = tuple(TASKS), kinds: Sequence[str] = KINDS, seeds: int = 1, steps: int = 300
) -> list[Job]:
    """Return every modified task without a delay, for every kind."""
    return [
        job(task, fields, kind, steps=times * steps, seed=seed)
        for seed in range(seeds)
        for task, fields, times in MENDED
        if task in tasks
        for kind in kinds
    ]


ORIGINALS: tuple[tuple[str, dict[str, Any]], ...] = (
    *(("occlusion", {"hidden": n, "hide": "middle", "ask": "last"}) for n in (0, 2, 4, 6)),
    *(("map", {"glimpses": n, "ask": "any", "queries": 1}) for n in (16, 32, 64)),
    *(("binding", {"pairs": n, "noise": noise, "queries": 1}) for n in (5, 10, 20, 50) for noise in (0.0, 0.05, 0.1)),
    ("no harm", {}),
)
"""The tasks as the paper has them."""

OF_ORIGINALS = "every cell"
"""Setting of the memory on the originals: all cells are updated, as in the paper."""

PARTS = ("kinds", "settings", "ablations", "delays", "originals")
"""Changes of the ablations in the full plan."""


def full_plan(seeds: int = 3, steps: int = 1000, parts: Sequence[str] = PARTS) -> list[Job]:
    """Return the modified tasks with every kind and setting, ablations and delays; then the originals with whole attention."""
    found: list[Job] = []
    for seed in range(seeds):
        own: dict[str, list[Job]] = {
            "kinds": [job(t, f, k, steps=n * steps, seed=seed) for t, f, n in MENDED for k in KINDS],
            "settings": [
                job(t, f, "memory", setting, steps=n * steps, seed=seed)
                for t, f, n in MENDED
                for setting in SETTINGS
                # Tokens of the other tasks have no place.
                if setting != "default" and (setting != "anchored" or hasattr(TASKS[t], "place"))
            ],
            "ablations": [job("binding", {}, "memory", setting, steps=steps, seed=seed) for setting in ABLATIONS],
            "delays": [
                job(t, {**f, "delay": DELAY}, setting=setting, steps=2 * n * steps, seed=seed, delays=DELAYS)
                for t, f, n in MENDED
                for setting in ("default", "every cell")
            ],
            "originals": [
                job(t, f, k, OF_ORIGINALS if k == "memory" else "default", attention="whole", steps=steps, seed=seed)
                for t, f in ORIGINALS
                for k in KINDS
            ],
        }
        found += [each for part in parts for each in own[part]]
    return found


def config_of(job: Job) -> DiagnosticConfig:
    """Return the run of a job.

    Raises:
        ValueError: for an unknown or invalid task, kind or setting.
    """
    settings = {**SETTINGS, **ABLATIONS}
    for name, known in (("task", TASKS), ("kind", KINDS), ("setting", settings)):
        if job[name] not in known:
            raise ValueError(f"no {name} {job[name]!r}; there are {', '.join(known)}")
    task = TASKS[job["task"]](**job["fields"])
    paper, changes = settings[job["setting"]]
    make = TensorMemoryConfig.paper if paper else TensorMemoryConfig
    memory = make(**{**GRIDS[job["task"]], **changes})
    backbone = BackboneConfig(
        task.features, task.classes, job["kind"], job["attention"], task.frame, getattr(task, "place", None), memory=memory
    )
    return DiagnosticConfig(
        task, backbone, steps=job["steps"], rate=job.get("rate", 1.0), seed=job["seed"], delays=tuple(job.get("delays", ()))
    )


def run(job: Job) -> Row:
    """Train one model and measure it; returns a row."""
    with tempfile.TemporaryDirectory() as folder:
        return {**job, **train_diagnostic(config_of(job), Path(folder), show=False)[1]}


def key(job: Job) -> str:
    """Return the fields that identify a run."""
    names = ("task", "fields", "attention", "kind", "setting", "steps", "seed")
    return json.dumps([*(job[name] for name in names), job.get("rate", 1.0), job.get("delays", [])], sort_keys=True)


def diagnostics(jobs: Sequence[Job], path: Path, processes: int = 1) -> Iterator[list[Row]]:
    """Run what is not in a file yet; see `tessera.lab.evaluation.jobs.resume`.

    Raises:
        ValueError: for an invalid job, before anything is run, or a file that holds something else.
    """
    for each in jobs:
        config_of(each)
    return resume(jobs, path, run, key, {}, processes)


def title(row: Row) -> str:
    """Describe a task."""
    task = TASKS[row["task"]](**row["fields"])
    if isinstance(task, Occlusion):
        words = [f"occlusion, {task.hidden} of {task.frames} hidden", _ASKED[task.ask]]
    elif isinstance(task, MapBuilding):
        words = [f"map, {task.glimpses} glimpses", f"{task.ask} cells"]
    elif isinstance(task, Binding):
        words = [f"binding, {task.pairs} pairs", f"noise {task.noise:g}"]
    else:
        words = [f"no harm, {task.symbols} symbols", "the next" if task.rule == "one" else "rule given"]
    delay = getattr(task, "delay", 0)
    return ", ".join(
        words + ([f"delay {delay:,}"] if delay else []) + (["whole attention"] if row["attention"] == "whole" else [])
    )


def by_kind(rows: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """Rows by title of the task, with the steps where there are several, then by kind; of memories the default alone, on the
    originals `OF_ORIGINALS`; delays left out."""
    found: dict[tuple[str, int], dict[str, list[Row]]] = {}
    for row in rows:
        wanted = OF_ORIGINALS if row["attention"] == "whole" else "default"
        if (row["kind"] != "memory" or row["setting"] == wanted) and "by_delay" not in row:
            found.setdefault((title(row), row["steps"]), {}).setdefault(row["kind"], []).append(row)
    tasks = [task for task, _ in found]
    return {task if tasks.count(task) == 1 else f"{task}, {steps:,} steps": own for (task, steps), own in found.items()}


def by_setting(rows: Sequence[Row], settings: Iterable[str]) -> tuple[list[str], dict[str, dict[str, list[Row]]]]:
    """Rows of a memory by title of the task, then by setting, with the plan's steps where there are several; delays, and tasks
    of a single setting, left out. In front of them the names of all settings."""
    found: dict[str, dict[tuple[str, int], list[Row]]] = {}
    for row in rows:
        if row["kind"] == "memory" and "by_delay" not in row:
            times = next((n for task, fields, n in MENDED if (task, fields) == (row["task"], row["fields"])), 1)
            found.setdefault(title(row), {}).setdefault((row["setting"], row["steps"] // times), []).append(row)
    found = {task: own for task, own in found.items() if len({setting for setting, _ in own}) > 1}
    steps = sorted({number for own in found.values() for _, number in own})
    names = {
        (setting, number): setting if len(steps) == 1 else f"{setting}, {number:,} steps"
        for setting in settings
        for number in steps
    }
    tasks = {task: {name: own[place] for place, name in names.items() if place in own} for task, own in found.items()}
    return [name for name in names.values() if any(name in own for own in tasks.values())], tasks


def by_delay(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows measured at several delays by title of the task, with the steps where there are several, and setting."""
    found: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        if "by_delay" in row:
            name = title({**row, "fields": {**row["fields"], "delay": 0}})
            found.setdefault((name, row["steps"], row["setting"]), []).append(row)
    steps = {task: {number for name, number, _ in found if name == task} for task, _, _ in found}
    return {
        (task if len(steps[task]) == 1 else f"{task}, {number:,} steps", setting): own
        for (task, number, setting), own in found.items()
    }


def spread(found: Sequence[float]) -> str:
    """Format mean ± standard deviation over the seeds; for one seed the number; for none an empty string."""
    if not found:
        return ""
    return f"{mean(found):.3f}" + (f" ± {stdev(found):.3f}" if len(found) > 1 else "")


def _accuracy(rows: Sequence[Row]) -> str:
    return spread([row["accuracy"] for row in rows])


def cells(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Make header and lines of the table of kinds: a line for each task."""
    lines = []
    for name, own in by_kind(rows).items():
        any_row = next(iter(own.values()))[0]
        bounds = (f"{any_row[bound]:.3f}" for bound in ("ceiling", "stateless", "chance"))
        lines.append((name, *(_accuracy(own[kind]) if kind in own else "" for kind in KINDS), *bounds))
    return ("task", *KINDS, "ceiling", "current frame", "guessing"), lines


def setting_cells(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Make header and lines of the table of settings: a line for each setting, a column for each task."""
    return _settings_table(*by_setting(rows, SETTINGS))


def ablation_cells(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Make header and lines of the table of ablations, beside the default."""
    tasks = {(title(row), row["steps"]) for row in rows if row["setting"] in ABLATIONS}
    own = [row for row in rows if (title(row), row["steps"]) in tasks]
    return _settings_table(*by_setting(own, ("default", *ABLATIONS)))


def gate_cells(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Make header and lines of the table of gates: how far each layer of the default opens to its memory after training."""
    lines = []
    for name, own in by_kind(rows).items():
        gates = [row["gates"] for row in own.get("memory", ())]
        if gates:
            lines.append((name, *(spread(layer) for layer in zip(*gates, strict=True)), f"{OPEN_AT_FIRST:.3f}"))
    layers = len(lines[0]) - 2 if lines else 0
    return ("task", *(f"layer {i + 1}" for i in range(layers)), "at the start"), lines


def _settings_table(names: list[str], found: dict[str, dict[str, list[Row]]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    return ("setting", *found), [
        (name, *(_accuracy(own[name]) if name in own else "" for own in found.values())) for name in names
    ]


def delay_cells(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Make header and lines of the table of delays: a line for each task and setting, with the accuracy at each delay."""
    found = by_delay(rows)
    delays = sorted({delay for own in found.values() for row in own for delay in row["by_delay"]}, key=int)
    lines = [
        (
            *name,
            *(spread([row["by_delay"][d] for row in own if d in row["by_delay"]]) for d in delays),
            f"{own[0]['chance']:.3f}",
        )
        for name, own in found.items()
    ]
    return ("task", "setting", *(f"{int(delay):,} blank" for delay in delays), "guessing"), lines


def diagnostics_tables(rows: Sequence[Row]) -> list[Table]:
    """Make tables of kinds, of settings where there are several, of ablations and delays where measured, and of gates."""
    made = []
    for header, lines in (cells(rows), setting_cells(rows), ablation_cells(rows), delay_cells(rows), gate_cells(rows)):
        if not lines or len(header) == 1:
            continue
        table = Table()
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i == 0 else "right")
        for line in lines:
            table.add_row(*line)
        made.append(table)
    return made
