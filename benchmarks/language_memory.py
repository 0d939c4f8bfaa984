"""Language beyond the window: the demo model's loss by distance from the start, with what lies behind its window and without.

The demo model was trained dense; its Tensor Cache was attached afterwards and trained with the model frozen
(`tessera train memory`). Controls: the memory's reads switched off, and a window that is longer by as many tokens as the
matrix takes bytes.

Example:

    python benchmarks/language_memory.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tessera.attachment import attachment, load_memory, reading
from tessera.evaluation.records import environment
from tessera.evaluation.sources import encode, windows
from tessera.files import atomic_path
from tessera.models import demo_memory_path, heldout_text, load_demo
from tessera.training.memory import loss_by_distance

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=Path, help="of the demo model  [default: the one that ships]")
    parser.add_argument("--windows", type=int, default=16, help="sequences of held-out text")
    parser.add_argument("--tokens", type=int, default=2048, help="of a sequence")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "language_memory.json")
    options = parser.parse_args()
    model, tokenizer = load_demo()
    load_memory(model, options.memory or demo_memory_path())
    done = attachment(model)
    assert done is not None
    window, sink, dim = done.config.window, done.config.sink, model.config.head_dim
    if options.tokens <= 4 * window:
        parser.error(f"--tokens must be more than four windows of {window}; got {options.tokens}")
    text = encode(tokenizer, heldout_text())
    ids = windows(text, options.tokens, options.windows, tokenizer.bos_token_id)
    edges = (1, window, 2 * window, 4 * window, options.tokens)
    # A float32 matrix of d x d is as large as d / 2 float32 pairs of a key and a value.
    specs = {
        "dense": "dense",
        "window": f"window:{window}",
        "window + sinks": f"sink:{sink} + window:{window}",
        "the same, longer by the memory's bytes": f"sink:{sink} + window:{window + dim // 2}",
        "with the Tensor Cache": f"sink:{sink} + window:{window} + tc",
        "its reads switched off": f"sink:{sink} + window:{window} + tc",
    }
    rows: list[dict[str, Any]] = []
    for name, spec in specs.items():
        reading(model, "off" not in name)
        with torch.inference_mode():
            losses = loss_by_distance(model, ids, spec, edges)
            beyond = loss_by_distance(model, ids, spec, (window, options.tokens))[0]
        rows.append({"name": name, "spec": spec, "losses": losses, "beyond": beyond})
    record = {"environment": environment(), "edges": edges, "windows": len(ids), "rows": rows}
    with atomic_path(options.json) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    table = Table("attention", *(f"tokens {a}–{b}" for a, b in itertools.pairwise(edges)), "beyond the window")
    for r in rows:
        table.add_row(r["name"], *(f"{loss:.4f}" for loss in r["losses"]), f"{r['beyond']:.4f}")
    Console().print(table)
    Console().print(f"Saved {options.json}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
