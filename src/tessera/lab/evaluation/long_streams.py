"""Long streams through a small model: bytes of state and tokens per second against the tokens read."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from tessera.cache import Cache
from tessera.evaluation.table import size
from tessera.lab.models.small_gpt import GPT, GPTConfig
from tessera.tiers.spec import parse

SPECS = ("dense", "window:256", "sink:4 + window:256 + tc")
"""The default caches."""

CALL = 256
"""Number of tokens of one call."""

FIRST = 1024
"""Number of tokens at the first row; each further row is at twice as many."""


def length(limit: int) -> int:
    """Round `limit` up to a number of tokens that is `FIRST` times a power of two."""
    mark = FIRST
    while mark < limit:
        mark *= 2
    return mark


@torch.inference_mode()
def stream(spec: str, limit: int, dense_limit: int) -> list[dict[str, Any]]:
    """Yield the rows of one cache, at `FIRST` tokens and every doubling.

    Args:
        spec: specification of the cache.
        limit: tokens at least, unless the cache grows without bound.
        dense_limit: the same for a cache that grows.

    Raises:
        ValueError: for a spec with a mistake.
    """
    parsed = parse(spec)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        config = GPTConfig(
            attention=str(parsed) if parsed.tensor_cache else SPECS[-1],
            vocab_size=256,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=1 << 21,
        )
        model = GPT(config).eval()
        cache = Cache(parsed, model)
        rows, seen, mark = [], 0, FIRST
        model(torch.randint(256, (1, CALL)))  # memory of the first call is not counted as growth
        before = resident()
        while seen < length(limit if parsed.bounded else min(limit, dense_limit)):
            began = time.perf_counter()
            while seen < mark:
                model(torch.randint(256, (1, CALL)), past_key_values=cache, logits_to_keep=1)
                seen += CALL
            speed = (mark - mark // 2 if mark > FIRST else mark) / (time.perf_counter() - began)
            row = {"spec": spec, "tokens": seen, "nbytes": cache.report().nbytes, "tokens_per_second": speed}
            now = resident()
            rows.append({**row, "process_growth": None if now is None or before is None else now - before})
            mark *= 2
    return rows


def streams(specs: Sequence[str], limit: int, dense_limit: int, done: Callable[[], None]) -> list[dict[str, Any]]:
    """Run `stream` for each spec in its own process, because memory left by others would hide its use.

    Args:
        specs, limit, dense_limit: as there.
        done: called after each spec.
    """
    rows: list[dict[str, Any]] = []
    for spec in specs:
        with ProcessPoolExecutor(1, get_context("spawn")) as apart:
            rows += apart.submit(_stream_with, torch.get_num_threads(), spec, limit, dense_limit).result()
        done()
    return rows


def _stream_with(threads: int, spec: str, limit: int, dense_limit: int) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    return stream(spec, limit, dense_limit)


def resident() -> int | None:
    """Return the resident bytes of this process, where the system reports them."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return int(fields["VmRSS"].split()[0]) * 1024


def streams_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Make the table of state and speed by length."""
    table = Table("cache", "tokens", "state", "tokens/s", "growth of the process")
    for row in rows:
        growth = "" if row["process_growth"] is None else size(max(0, row["process_growth"]))
        table.add_row(row["spec"], f"{row['tokens']:,}", size(row["nbytes"]), f"{row['tokens_per_second']:,.0f}", growth)
    return table
