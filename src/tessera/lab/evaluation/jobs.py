"""Plans of many runs, whose results are written to one file after each run, so that an interrupted plan can continue."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from tessera.evaluation.records import environment
from tessera.files import write_json

Job = dict[str, Any]
"""The fields that identify a run."""

Row = dict[str, Any]
"""A job and its results."""


def resume(
    jobs: Sequence[Job],
    path: Path,
    run: Callable[[Job], Row],
    key: Callable[[Job], object],
    about: dict[str, Any],
    processes: int = 1,
) -> Iterator[list[Row]]:
    """Run what is not in a file yet; yields all rows of the file once, and again after each run, when it is written.

    Args:
        jobs: to be run.
        path: path of the JSON.
        run: a function defined in a module, so that other processes can import it.
        key: returns the hashable identity of a job or a row.
        about: further entries of the file.
        processes: number of runs at once.

    Raises:
        ValueError: if the file holds something else.
    """
    try:
        rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
        done = {key(row) for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no results of {path.stem}: {error!r}") from error
    return _resume([job for job in jobs if key(job) not in done], rows, path, run, about, processes)


def _resume(
    jobs: Sequence[Job], rows: list[Row], path: Path, run: Callable[[Job], Row], about: dict[str, Any], processes: int
) -> Iterator[list[Row]]:
    yield rows
    for row in _run_all(jobs, run, processes):
        rows = [*rows, row]
        write_json(path, {"environment": environment(), **about, "rows": rows})
        yield rows


def _run_all(jobs: Sequence[Job], run: Callable[[Job], Row], processes: int) -> Iterator[Row]:
    if processes == 1 or len(jobs) < 2:
        yield from map(run, jobs)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_begin_worker) as pool:
        for future in as_completed([pool.submit(run, job) for job in jobs]):
            yield future.result()


def _begin_worker() -> None:
    """Give each of several processes one core, and let only the first one print."""
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
