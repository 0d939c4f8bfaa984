"""Retrieval from long texts through a cache: a needle at every depth, and RULER's synthetic tasks.

The text is read into the cache `chunk` tokens a call; then the question, in a call of its own, which reads the text through the
cache; then the model answers, greedily. Beside the share of right answers there is the mean negative log-likelihood of the
right answer's tokens, in nats, which separates caches even with few texts. Every cache is asked the same questions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from tessera.adapters import attached_memory
from tessera.cache import Cache
from tessera.evaluation.loading import Source
from tessera.lab.evaluation.jobs import Job, Row, resume
from tessera.lab.tasks.retrieval import RULER, Prompt, Task, fit, needle, score
from tessera.tiers.per_layer import parse

SPECS = (
    "dense",
    "sink:4 + hqmq:4 + recent:128",
    "sink:4 + hqmq:3 + recent:128",
    "sink:4 + q4_0 + recent:128",
    "sink:4 + kivi:4 + recent:128",
    "sink:4 + fp8 + recent:128",
    "sink:4 + window:512",
    "window:512",
    "sink:4 + hqmq:4/top:512 + recent:128",
)
"""The default caches."""

LENGTHS = (1024, 2048, 4096)
DEPTHS = (0, 25, 50, 75, 100)
CAPABLE = 0.5
"""Where the exact cache scores less than this, the model cannot do the task, so a cache's cost cannot be measured."""


def needle_plan(
    model: str, specs: Sequence[str], lengths: Sequence[int], depths: Sequence[int], samples: int, seed: int, chunk: int
) -> list[Job]:
    """Make a job for each cell: a cache, a length in tokens and a depth in percent; lengths first, then caches."""
    return [
        {**_job(model, spec, "needle", length, samples, seed, chunk), "depth": depth}
        for length in lengths
        for spec in specs
        for depth in depths
    ]


def ruler_plan(
    model: str, specs: Sequence[str], lengths: Sequence[int], tasks: Sequence[str], samples: int, seed: int, chunk: int
) -> list[Job]:
    """Make a job for each cache, task of `RULER` and length in tokens; lengths first, then tasks."""
    return [_job(model, spec, task, length, samples, seed, chunk) for length in lengths for task in tasks for spec in specs]


def _job(model: str, spec: str, task: str, length: int, samples: int, seed: int, chunk: int) -> Job:
    return {
        "model": model,
        "spec": str(parse(spec)),
        "task": task,
        "length": length,
        "samples": samples,
        "seed": seed,
        "chunk": chunk,
    }


def key(job: Job) -> tuple[Any, ...]:
    """Return the fields that identify a run."""
    names = ("model", "spec", "task", "length", "samples", "seed", "chunk")
    return (*(job[name] for name in names), job.get("depth"))


def task_of(job: Job) -> Task:
    """Return the task of a job.

    Raises:
        ValueError: for an unknown task or an invalid depth.
    """
    if job["task"] == "needle":
        if not 0 <= job["depth"] <= 100:
            raise ValueError(f"a depth is a percentage from 0 to 100, got {job['depth']}")
        return needle(job["depth"] / 100)
    if job["task"] not in RULER:
        raise ValueError(f"no task {job['task']!r}; there are {', '.join(RULER)}")
    return RULER[job["task"]]


def measure(source: Source, jobs: Sequence[Job], path: Path) -> Iterator[list[Row]]:
    """Run what is not in a file yet; yields all rows of the file once, and again after each run, when it is written.

    Args:
        source: the model and its tokenizer.
        jobs: jobs that `needle_plan` or `ruler_plan` made for this model.
        path: path of the JSON; a plan that was cut short goes on where it was.

    Raises:
        ValueError: for an invalid job, before anything is run, or a file that holds something else.
    """
    for job in jobs:
        task_of(job)
        if source.context is not None and job["length"] > source.context:
            raise ValueError(f"{job['length']} tokens are more than the {source.context} that the model was made for")
        if parse(job["spec"]).tensor_cache and attached_memory(source.model) is None:
            raise ValueError(f"{job['spec']!r} has a Tensor Cache; give its file")

    @lru_cache(maxsize=256)
    def prompt(task: str, length: int, depth: int | None, seed: int, number: int) -> Prompt:
        about = {"task": task, "length": length, "depth": depth}
        # The same needle at all depths.
        return fit(task_of(about), source.tokenizer, length, f"{task} {length} {seed} {number}")

    def run(job: Job) -> Row:
        prompts = [
            prompt(job["task"], job["length"], job.get("depth"), job["seed"], number) for number in range(job["samples"])
        ]
        return {**job, **_run(source, task_of(job), prompts, job["spec"], job["chunk"])}

    return resume(jobs, path, run, key, {}, 1)


def _run(source: Source, task: Task, prompts: Sequence[Prompt], spec: str, chunk: int) -> Row:
    found: dict[str, list[Any]] = {"scores": [], "nats": [], "written": []}
    for prompt in prompts:
        cache = Cache(spec, source.model)
        nats, written = answer(source, prompt, cache, task.new_tokens, chunk)
        found["scores"].append(score(written, prompt.answers))
        found["nats"].append(nats)
        found["written"].append(written[:100])
    report = cache.report()
    return {**found, "tokens": len(prompts[-1].ids), "nbytes": report.nbytes, "bits": report.bits_per_element}


def answer(source: Source, prompt: Prompt, cache: Cache, new_tokens: int, chunk: int) -> tuple[float, str]:
    """Read a prompt through an empty cache, and answer.

    Args:
        source: the model and its tokenizer.
        prompt: text, question, and the beginning of the answer.
        cache: holds the prompt and the answer afterwards.
        new_tokens: tokens that are generated at most.
        chunk: tokens of a call while the text is read.

    Returns:
        nats a token of the right answers, in their order, and what the model writes.
    """
    model, tokenizer = source.model, source.tokenizer
    ids = torch.tensor([prompt.ids], device=model.device)
    end, text = ids.shape[1] - 1, ids.shape[1] - prompt.behind
    right = tokenizer(" " + " ".join(prompt.answers), add_special_tokens=False, verbose=False)["input_ids"]
    with torch.inference_mode():
        for begin in range(0, text, chunk):
            model(ids[:, begin : min(text, begin + chunk)], past_key_values=cache, logits_to_keep=1)
        if text < end:
            model(ids[:, text:end], past_key_values=cache, logits_to_keep=1)
        # The last token is read twice with the following tokens: once with the right answer, once with the model's own.
        given = torch.tensor([[prompt.ids[-1], *right]], device=model.device)
        logits = model(given[:, :-1], past_key_values=copy.deepcopy(cache)).logits
        nats = float(torch.nn.functional.cross_entropy(logits[0].float(), given[0, 1:]))
        made: Tensor = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or 0,
        )
    return nats, tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def over(rows: Sequence[Row], name: str, **wanted: Any) -> float | None:
    """Compute the mean of a field over all texts of the rows with these values; None: there are no such rows."""
    found = [x for row in rows if all(row.get(k) == v for k, v in wanted.items()) for x in row[name]]
    return mean(found) if found else None


def specs_of(rows: Sequence[Row]) -> list[str]:
    """List the caches of some rows, "dense" first."""
    return sorted(dict.fromkeys(row["spec"] for row in rows), key=lambda spec: spec != "dense")


def incapable(rows: Sequence[Row], **wanted: Any) -> bool:
    """Whether the model fails even with the exact cache, where that was measured."""
    exact = over(rows, "scores", spec="dense", **wanted)
    return exact is not None and exact < CAPABLE


def cell(rows: Sequence[Row], **wanted: Any) -> str:
    """Format the share of right answers and nats; in brackets where the model fails with the exact cache too."""
    share, nats = over(rows, "scores", **wanted), over(rows, "nats", **wanted)
    if share is None or nats is None:
        return ""
    text = f"{share:.0%} {nats:.3f}"
    rest = {name: value for name, value in wanted.items() if name != "spec"}
    return f"({text})" if incapable(rows, **rest) else text


def grid(rows: Sequence[Row], columns: str, **fixed: Any) -> tuple[list[str], list[list[str]]]:
    """Make header and lines of a table: a line for each cache, a column for each value of a field, "length" or "task"."""
    rows = [row for row in rows if all(row.get(k) == v for k, v in fixed.items())]
    values = list(dict.fromkeys(row[columns] for row in rows))
    head = ["cache", "bits", *(f"{v:,} tokens" if isinstance(v, int) else str(v) for v in values)]
    lines = []
    for spec in specs_of(rows):
        bits = [row["bits"] for row in rows if row["spec"] == spec and row["length"] == max(r["length"] for r in rows)]
        shown = f"{mean(bits):.2f}" if bits else ""
        lines.append([spec, shown, *(cell(rows, spec=spec, **{columns: value}) for value in values)])
    return head, lines


def remarks(rows: Sequence[Row], columns: str) -> list[str]:
    """Write sentences about tasks that the model fails with the exact cache."""
    values = list(dict.fromkeys((row["length"], row[columns]) for row in rows))
    found: dict[str, list[str]] = {}
    for length, value in values:
        if incapable(rows, length=length, **({columns: value} if columns != "length" else {})):
            what = "the needle" if columns == "length" else str(value)
            share = over(rows, "scores", spec="dense", length=length, **({columns: value} if columns != "length" else {}))
            found.setdefault(what, []).append(f"{length:,} tokens: {share:.0%}")
    return [
        f"In brackets: the model itself does not do {what} ({', '.join(where)} with the exact cache), so nothing follows from "
        "the other caches' figures there."
        for what, where in found.items()
    ]


def needle_table(rows: Sequence[Row]) -> Table:
    """Make the table of the share of needles found, and nats, for each cache and length, over all depths."""
    return _table(*grid(rows, "length"))


def ruler_tables(rows: Sequence[Row]) -> list[Table]:
    """Make one table for each length: score and nats for each cache and task."""
    lengths = sorted({row["length"] for row in rows})
    return [_table(*grid(rows, "task", length=n), title=f"{n:,} tokens") for n in lengths]


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], title: str | None = None) -> Table:
    table = Table(*head, title=title)
    for line in lines:
        table.add_row(*line)
    return table
