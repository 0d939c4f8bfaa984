"""Train the demo model further with different attention, and compare the losses beyond a window of 256 tokens.

The demo model was trained dense. Every row is that model, all of its weights trained further under one attention in sequences
of eight windows, and its loss by position in the sequence on held-out modules. The controls: the dense model trained as much, a
window that is longer by as many tokens as the matrices take bytes, an MLP that is wider by as many parameters as the memory
has, and the memory's reads switched off when it is measured. The Tensor Cache is compared with a Tensor Memory, attached to the
same window and trained with the model.

Each run is saved when it ends, and an interrupted plan resumes. The data is read once into a separate folder.

Example:

    python benchmarks/language_tuned.py
    python benchmarks/language_tuned.py --seeds 1 --steps 2 --json /tmp/x.json   # to see that it runs
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from stretches import GRID, GRID_CONFIG, with_and_without
from tessera.adapters import attach, attached_memory
from tessera.evaluation import load
from tessera.evaluation.loading import windows
from tessera.evaluation.records import environment
from tessera.files import write_json
from tessera.lab.models.small_gpt import GPT, GPTConfig
from tessera.lab.training.corpus import Corpus
from tessera.lab.training.lm import prepare_lm
from tessera.lab.training.loop import train
from tessera.lab.training.schedule import LoopConfig, Phase
from tessera.models import demo_memory_path

ROOT = Path(__file__).resolve().parent.parent
WINDOW = 256
SEQUENCE = 8 * WINDOW
EDGES = (1, WINDOW, 2 * WINDOW, 4 * WINDOW, SEQUENCE)
#: Number of held-out sequences that a model is measured on.
MEASURED = 32
BATCH = 2
MEMORY = "with a Tensor Cache"
SHIPPED = "with the Tensor Cache that ships"
WIDER = "wider by the memory's parameters"
SINKS = f"sink:4 + window:{WINDOW}"
#: Name -> attention. A float32 matrix of d x d takes the bytes of d / 2 float32 key-value pairs; d is 64.
ARMS = {
    "dense": "dense",
    "window": f"window:{WINDOW}",
    "window + sinks": SINKS,
    MEMORY: f"{SINKS} + tc",
    SHIPPED: f"{SINKS} + tc",
    "longer by the memory's bytes": f"sink:4 + window:{WINDOW + 32}",
    WIDER: SINKS,
    "Infini-attention": f"infini:{WINDOW}",
    GRID: SINKS,
}


def build(arm: str, seed: int) -> GPT:
    """Make the demo model with the attention of an arm; new weights have no effect, or a small one, before training."""
    demo = load().model
    fields = {k: v for k, v in demo.config.to_dict().items() if k not in ("model_type", "architectures", "dtype")}
    width = fields.pop("intermediate_size")
    if arm == WIDER:
        more = sum(p.numel() for p in build(MEMORY, seed).parameters()) - sum(p.numel() for p in demo.parameters())
        width += round(more / (3 * fields["hidden_size"] * fields["num_hidden_layers"]))
    torch.manual_seed(seed)
    model = GPT(GPTConfig(attention=ARMS[arm], intermediate_size=width, **fields)).float()
    own = model.state_dict()
    with torch.no_grad():
        for name, weight in demo.state_dict().items():
            if "down_proj" in name:
                own[name].zero_()  # the new channels contribute zero at first
            own[name][tuple(map(slice, weight.shape))] = weight.float()
    if arm == GRID:
        attach(model, GRID_CONFIG)
        model.requires_grad_(True)
    if arm == SHIPPED:
        tensors, memory = load_file(demo_memory_path()), attached_memory(model)
        assert memory is not None
        for name, module in memory.modules().items():
            module.load_state_dict({k.partition(".")[2]: v for k, v in tensors.items() if k.partition(".")[0] == name})
    return model


def run(arm: str, seed: int, steps: int, corpus: Corpus, ids: Tensor) -> list[dict[str, Any]]:
    """Train one model and measure it; a model with a memory also with its reads switched off."""
    model = build(arm, seed)
    about = {"arm": arm, "seed": seed, "steps": steps, "parameters": sum(p.numel() for p in model.parameters())}
    if steps:
        loop = LoopConfig(
            phases=(Phase(1.0, SEQUENCE, BATCH),),
            steps=steps,
            muon_lr=1e-3,
            adamw_lr=3e-4,
            mixed_precision="no",
            warmup_steps=min(10, 1 + steps // 10),
            checkpoint_seconds=1e9,
            seed=seed,
        )
        with tempfile.TemporaryDirectory() as folder:
            train(model, corpus.sample, loop, Path(folder))
    return with_and_without(model, about, ids, EDGES, 4)


def main() -> int:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80, help=f"steps of training, {BATCH} sequences each")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "language_tuned", help="folder for the tokens and runs")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "language_tuned.json")
    options = parser.parse_args()
    tokenizer, corpus, text = prepare_lm(None, [], options.folder)
    ids = windows(torch.tensor(tokenizer.encode(text).ids), SEQUENCE, MEASURED, corpus.bos)
    rows: list[dict[str, Any]] = json.loads(options.json.read_text())["rows"] if options.json.is_file() else []
    plan = [("dense", 0, 0), *((arm, seed, options.steps) for seed in range(options.seeds) for arm in ARMS)]
    for arm, seed, steps in plan:
        if any((r["arm"], r["seed"], r["steps"]) == (arm, seed, steps) for r in rows):
            continue
        rows += run(arm, seed, steps, corpus, ids)
        write_json(options.json, {"environment": environment(), "window": WINDOW, "edges": EDGES, "batch": BATCH, "rows": rows})
    table = Table(
        "attention", "steps", "seed", "parameters", *(f"{a}–{b}" for a, b in itertools.pairwise(EDGES)), "beyond the window"
    )
    for r in rows:
        losses = (f"{x:.4f}" for x in (*r["losses"], r["beyond"]))
        table.add_row(r["arm"], str(r["steps"]), str(r["seed"]), f"{r['parameters']:,}", *losses)
    Console().print(table)
    Console().print(f"Saved {options.json}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
