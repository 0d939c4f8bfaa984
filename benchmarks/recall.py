"""Associative recall beyond the window: which attention, trained from nothing, still knows a value that has left it.

Small GPTs of two layers learn to recall pairs over a forced gap (`tessera.tasks.recall`). The gap is longer than what two
windows can pass on, so a window is at chance whatever it learns. Every row is one model: accuracy at the gap it was trained
on and at others, and the bytes that it must keep for a sequence, at the length of the training sequences.

Runs are saved one by one; a run that is cut short goes on where it was.

Example:

    python benchmarks/recall.py
    python benchmarks/recall.py --quick      # a minute, to see that it runs
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tessera.evaluation.records import environment
from tessera.files import atomic_path
from tessera.models.gpt import GPT, GPTConfig, read_attention
from tessera.tasks.recall import Recall, accuracy
from tessera.training.loop import Moment, train
from tessera.training.schedule import LoopConfig, Phase

ROOT = Path(__file__).resolve().parent.parent
WINDOW, LAYERS, HEADS = 16, 2, 2
GAPS = (0, 32, 64, 128, 256, 512)
#: Sequences that a trained model is measured on, at each gap.
MEASURED = 256
#: Name -> attention and options of the memory.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "window": (f"window:{WINDOW}", {}),
    "window + sinks": (f"sink:4 + window:{WINDOW}", {}),
    "Infini-attention": (f"infini:{WINDOW}", {}),
    "Tensor Cache, delta": (f"window:{WINDOW} + tc", {}),
    "Tensor Cache, outer": (f"window:{WINDOW} + tc", {"rule": "outer"}),
    "Tensor Cache, delta, rotary": (f"window:{WINDOW} + tc", {"rotary": True}),
    "Tensor Cache, the paper's setting": (f"window:{WINDOW} + tc", {"paper": True}),
}


def memory_fields(options: dict[str, Any]) -> dict[str, Any] | None:
    """Options of `METHODS` as fields of `TensorCacheConfig`."""
    if not options.get("paper"):
        return options or None
    from tessera.associative import TensorCacheConfig

    fields = TensorCacheConfig.paper().to_dict()
    return {name: value for name, value in fields.items() if name not in ("window", "sink")}


def state_bytes(method: str, dim: int, length: int) -> int:
    """Bytes in float32 that all layers keep after `length` tokens."""
    limits, memory, segment = read_attention(METHODS[method][0])
    pair, matrix = 2 * dim * 4, dim * dim * 4
    if segment is not None:
        kept = segment * pair + matrix + dim * 4
    elif limits is not None:
        kept = min(length, limits.window + limits.sink) * pair + (matrix if memory is not None else 0)
    else:
        kept = length * pair
    return LAYERS * HEADS * kept


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train one model and measure it."""
    torch.set_num_threads(1)
    attention, options = METHODS[job["method"]]
    task = Recall(pairs=job["pairs"], gap=64, keys=max(64, job["pairs"]), rewrites=job["rewrites"])
    torch.manual_seed(job["seed"])
    dim = job["dim"]
    config = GPTConfig(
        attention=attention,
        memory=memory_fields(options),
        vocab_size=task.vocabulary,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=dim,
        max_position_embeddings=2048,
    )
    model = GPT(config)
    loop = LoopConfig(
        phases=(Phase(1.0, task.length, 32, 32),),
        steps=job["steps"],
        muon_lr=3e-3,
        adamw_lr=2e-3,
        warmup_steps=50,
        mixed_precision="no",
        checkpoint_seconds=1e9,
        seed=job["seed"],
    )

    def sample(seed: tuple[int, ...], batch: int, _: int) -> tuple[torch.Tensor, torch.Tensor]:
        # With the zeros, as the runs in docs/results were drawn.
        return task.sample(batch, torch.Generator().manual_seed(hash((*seed, 0, 0)) % (1 << 31)))

    @torch.no_grad()
    def measure(gap: int) -> float:
        tokens, targets = replace(task, gap=gap).sample(MEASURED, torch.Generator().manual_seed(10**6 + gap))
        return accuracy(model(tokens).logits, targets)

    found: dict[str, float] = {}

    def at_end(moment: Moment) -> dict[str, float]:
        if moment.progress >= 1:
            found.update({str(gap): measure(gap) for gap in GAPS})
        return found

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        train(model, sample, loop, Path(folder), on_checkpoint=at_end)
    return {
        **job,
        "accuracy": found["64"],
        "by_gap": found,
        "chance": task.chance,
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_bytes": state_bytes(job["method"], dim, task.length),
        "seconds": time.monotonic() - began,
    }


def plan(seeds: int, steps: int) -> list[dict[str, Any]]:
    """All runs: every method on 16 pairs with several seeds, the memories on more pairs, other widths, and rewritten keys."""
    base = {"pairs": 16, "dim": 64, "rewrites": 0, "steps": steps}
    jobs = [{**base, "method": method, "seed": seed} for seed in range(seeds) for method in METHODS]
    memories = ("Infini-attention", "Tensor Cache, delta", "Tensor Cache, outer")
    jobs += [{**base, "method": m, "seed": 0, "rewrites": 8} for m in memories]
    jobs += [{**base, "method": m, "seed": 0, "pairs": pairs} for pairs in (32, 64) for m in memories]
    jobs += [{**base, "method": m, "seed": 0, "dim": dim} for dim in (16, 32) for m in memories]
    return jobs


def key(job: dict[str, Any]) -> tuple[Any, ...]:
    """What tells one run from another."""
    return tuple(job[name] for name in ("method", "pairs", "dim", "rewrites", "steps", "seed"))


def main() -> int:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="of every method on 16 pairs")
    parser.add_argument("--steps", type=int, default=600, help="of training, 32 sequences each")
    parser.add_argument("--jobs", type=int, default=max(1, torch.get_num_threads()), help="models trained at once")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="only these")
    parser.add_argument("--quick", action="store_true", help="few steps, one seed, 16 pairs only")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "recall.json")
    options = parser.parse_args()
    jobs = plan(options.seeds, options.steps)
    if options.quick:
        jobs = [job for job in plan(1, 20) if key(job)[1:4] == (16, 64, 0)]
    jobs = [job for job in jobs if options.methods is None or job["method"] in options.methods]
    rows: list[dict[str, Any]] = json.loads(options.json.read_text())["rows"] if options.json.is_file() else []
    done = {key(row) for row in rows}
    jobs = [job for job in jobs if key(job) not in done]

    def save() -> None:
        record = {"environment": environment(), "window": WINDOW, "layers": LAYERS, "heads": HEADS, "rows": rows}
        with atomic_path(options.json) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    with (
        ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool,
        Progress(console=Console(stderr=True), transient=True) as progress,
    ):
        bar = progress.add_task("training", total=len(jobs))
        for future in as_completed([pool.submit(run, job) for job in jobs]):
            rows.append(future.result())
            save()
            progress.advance(bar)
    table = Table("method", "pairs", "d", "rewritten", "seed", "accuracy", "KiB of state")
    for row in sorted(rows, key=key):
        cells = (row["method"], row["pairs"], row["dim"], row["rewrites"], row["seed"], f"{row['accuracy']:.3f}")
        table.add_row(*map(str, cells), f"{row['state_bytes'] / 1024:.0f}")
    Console().print(table)
    Console().print(f"Saved {options.json}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
