"""Check the accuracy of a Tensor Cache's float32 state over a million writes, and measure what bfloat16 would lose.

Keys and values in bfloat16 leave a window one by one and are written by `TensorCache.step`. The same writes in float64 give
the expected state, and an upper bound of its norm for the decays shows whether it stays bounded. The same with a state
rounded to bfloat16 after every write shows why the state is float32: a decay of 0.9999 changes no bfloat16 number.

Example:

    python benchmarks/long_run.py
    python benchmarks/long_run.py --steps 2000   # a few seconds
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize

from tessera.evaluation.records import environment
from tessera.files import write_json
from tessera.tensor_cache import TensorCache, TensorCacheConfig
from tessera.tensor_cache.recurrence import write

ROOT = Path(__file__).resolve().parent.parent
DIM = 32
#: Decays of the heads, from half-lives of 7 tokens to 70,000.
DECAYS = (0.9, 0.99, 0.999, 0.9999, 0.99999)
RULES = ("outer", "delta")


def bound(decay: float, rate: float, largest: float) -> float:
    """Return an upper bound of the norm of a state that is multiplied by `decay` and then changed by at most rate · largest."""
    return rate * largest / (1 - decay)


@torch.inference_mode()
def follow(rule: str, steps: int, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Return a row per power of ten: for each head the relative errors of both states, and its norm as a share of the bound."""
    torch.manual_seed(0)
    heads, rate = len(DECAYS), 0.05
    memory = TensorCache(TensorCacheConfig(rule=rule, write_rate=rate), heads, DIM)  # type: ignore[arg-type]
    memory.decay_logit.copy_(torch.tensor([math.log(d) - math.log1p(-d) for d in DECAYS]))
    # The rates are the module's float32 ones, so that only the rounding of states differs.
    decay = torch.nn.functional.logsigmoid(memory.decay_logit).exp()[None]
    eta = torch.minimum(memory.write_rate, decay).double() if rule == "delta" else memory.write_rate.double()[None]
    g = decay.double().log()
    state = memory.initial_state(1)
    exact, half = torch.zeros(1, heads, DIM, DIM, dtype=torch.float64), torch.zeros(1, heads, DIM, DIM, dtype=torch.bfloat16)
    largest, rows = 0.0, []
    bar = None if progress is None else progress.add_task(rule, total=steps)
    marks = {10**i for i in range(1, 20) if 10**i <= steps} | {steps}
    query = torch.zeros(1, heads, 1, DIM, dtype=torch.bfloat16)
    for step in range(1, steps + 1):
        k, v = torch.randn(2, 1, heads, 1, DIM).bfloat16().unbind(0)
        _, state = memory.step(query, k, v, state)
        unit, value = normalize(k[:, :, 0].float(), dim=-1), v[:, :, 0]
        exact = write(exact, unit.double(), value.double(), g, eta, rule)  # type: ignore[arg-type]
        half = write(half.float(), unit, value.float(), g.float(), eta.float(), rule).bfloat16()  # type: ignore[arg-type]
        largest = max(largest, float(value.float().norm(dim=-1).max()))
        if step in marks:
            rows += [_row(rule, step, i, exact, state.a, half, bound(DECAYS[i], rate, largest)) for i in range(heads)]
        if progress is not None and bar is not None and step % 100 == 0:
            progress.update(bar, completed=step)
    return rows


def _row(rule: str, step: int, head: int, exact: Tensor, state: Tensor, half: Tensor, most: float) -> dict[str, Any]:
    wanted, found, rough = (x[0, head].double() for x in (exact, state, half))
    return {
        "rule": rule,
        "steps": step,
        "decay": DECAYS[head],
        "float32_error": float((found - wanted).norm() / wanted.norm()),
        "bfloat16_error": float((rough - wanted).norm() / wanted.norm()),
        "share_of_bound": float(found.norm() / most),
        "finite": bool(found.isfinite().all()),
    }


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "long_run.json")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for rule in RULES:
            rows += follow(rule, options.steps, progress)
    record = {"environment": environment(), "head_dim": DIM, "rows": rows}
    write_json(options.json, record)
    table = Table("rule", "writes", "decay", "error, float32", "error, bfloat16", "norm, of the bound")
    for r in rows:
        cells = (f"{r['float32_error']:.1e}", f"{r['bfloat16_error']:.3f}", f"{r['share_of_bound']:.3f}")
        table.add_row(r["rule"], f"{r['steps']:,}", str(r["decay"]), *cells)
    Console().print(table)
    Console().print(f"Saved {options.json}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
