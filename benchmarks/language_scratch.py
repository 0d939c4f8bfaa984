"""Train small GPTs with different attention and compare their losses beyond a window of 64 tokens, and their costs.

GPTs of four layers are trained on sequences of eight windows, of the given files or of Python source. Every row is one model:
its loss by position in the sequence, on held-out text. The controls: a window that is longer by as many tokens as the
matrices take bytes, an MLP that is wider by as many parameters as the memory has, and the memory's reads switched off when it
is measured. The Tensor Cache is compared with a Tensor Memory, attached to the same window and trained with the model.

Each run is saved when it ends, and an interrupted plan resumes. The data is read once into a separate folder.

Example:

    python benchmarks/language_scratch.py
    python benchmarks/language_scratch.py --data stories.txt --json stories.json
    python benchmarks/language_scratch.py --seeds 1 --steps 20   # to see that it runs
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
from torch import Tensor

from stretches import GRID, GRID_CONFIG, with_and_without
from tessera.adapters import attach
from tessera.evaluation.loading import windows
from tessera.evaluation.records import environment
from tessera.files import write_json
from tessera.lab.models.small_gpt import GPT, GPTConfig
from tessera.lab.training.corpus import Corpus
from tessera.lab.training.demo import shrink_branches
from tessera.lab.training.lm import prepare_lm
from tessera.lab.training.loop import train
from tessera.lab.training.schedule import LoopConfig, Phase

ROOT = Path(__file__).resolve().parent.parent
WINDOW, LAYERS, HEADS, DIM, HIDDEN, MLP = 64, 4, 2, 64, 128, 384
SEQUENCE = 8 * WINDOW
EDGES = (1, WINDOW, 2 * WINDOW, 4 * WINDOW, SEQUENCE)
#: Number of held-out sequences that a model is measured on, and sequences per call.
MEASURED, TOGETHER = 96, 16
MEMORY = "with a Tensor Cache"
#: Name -> attention, and the width of the MLP if it differs.
ARMS: dict[str, tuple[str, int]] = {
    "dense": ("dense", MLP),
    "window": (f"window:{WINDOW}", MLP),
    "window + sinks": (f"sink:4 + window:{WINDOW}", MLP),
    MEMORY: (f"sink:4 + window:{WINDOW} + tc", MLP),
    GRID: (f"sink:4 + window:{WINDOW}", MLP),
    # A float32 matrix of d x d takes the bytes of d / 2 float32 key-value pairs.
    "longer by the memory's bytes": (f"sink:4 + window:{WINDOW + DIM // 2}", MLP),
    "wider by the memory's parameters": (f"sink:4 + window:{WINDOW}", MLP + 43),
    "Infini-attention": (f"infini:{WINDOW}", MLP),
}


def build(arm: str, seed: int, vocabulary: int) -> GPT:
    """Make the untrained model of an arm."""
    attention, mlp = ARMS[arm]
    torch.manual_seed(seed)
    model = GPT(
        GPTConfig(
            attention=attention,
            vocab_size=vocabulary,
            hidden_size=HIDDEN,
            intermediate_size=mlp,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            head_dim=DIM,
            max_position_embeddings=SEQUENCE,
            tie_word_embeddings=True,
        )
    )
    with torch.no_grad():
        shrink_branches(model, LAYERS)
    if arm == GRID:
        attach(model, GRID_CONFIG)
        model.requires_grad_(True)
    return model


def run(arm: str, seed: int, steps: int, precision: str, corpus: Corpus, ids: Tensor, vocabulary: int) -> list[dict[str, Any]]:
    """Train one model and measure it; a model with a memory also with its reads switched off."""
    model = build(arm, seed, vocabulary)
    loop = LoopConfig(
        phases=(Phase(1.0, SEQUENCE, 8),),
        steps=steps,
        mixed_precision=precision,
        warmup_steps=min(50, 1 + steps // 10),
        checkpoint_seconds=1e9,
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        train(model, corpus.sample, loop, Path(folder))
    about = {"arm": arm, "seed": seed, "steps": steps, "parameters": sum(p.numel() for p in model.parameters())}
    return with_and_without(model, about, ids, EDGES, TOGETHER)


def main() -> int:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600, help="steps of training, 8 sequences each")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=tuple(ARMS), help="rows to train")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no", help="precision of training (autocast)")
    parser.add_argument("--data", type=Path, nargs="+", default=(), help="UTF-8 text files  [default: installed Python source]")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "runs" / "language_scratch", help="folder for the tokens and runs"
    )
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "language_scratch.json")
    options = parser.parse_args()
    about = {
        "data": [path.name for path in options.data],
        "precision": options.precision,
        "window": WINDOW,
        "edges": list(EDGES),
    }
    saved: dict[str, Any] = json.loads(options.json.read_text()) if options.json.is_file() else {**about, "rows": []}
    rows: list[dict[str, Any]] = saved["rows"]
    if any(saved.get(name) != value for name, value in about.items()):
        parser.error(f"{options.json} holds runs of other data or precision; give another --json")
    tokenizer, corpus, text = prepare_lm(None, options.data, options.folder)
    ids = windows(torch.tensor(tokenizer.encode(text).ids), SEQUENCE, MEASURED, corpus.bos)
    for seed, arm in itertools.product(range(options.seeds), options.arms):
        if any((r["arm"], r["seed"], r["steps"]) == (arm, seed, options.steps) for r in rows):
            continue
        rows += run(arm, seed, options.steps, options.precision, corpus, ids, tokenizer.get_vocab_size())
        write_json(options.json, {"environment": environment(), **about, "rows": rows})
    table = Table("attention", "seed", "parameters", *(f"{a}–{b}" for a, b in itertools.pairwise(EDGES)), "beyond the window")
    for r in rows:
        losses = (f"{x:.4f}" for x in (*r["losses"], r["beyond"]))
        table.add_row(r["arm"], str(r["seed"]), f"{r['parameters']:,}", *losses)
    Console().print(table)
    Console().print(f"Saved {options.json}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
