"""Measure the demo model's loss by distance from the start, with a Tensor Cache and without.

See `tessera.lab.evaluation.language`. The demo model was trained dense; its Tensor Cache was attached afterwards and trained
with the model frozen (`tessera train
memory`). Several memories are treated as several seeds of one recipe; everything else is measured once.

Example:

    python benchmarks/language_memory.py
    python benchmarks/language_memory.py --memory seed0/memory.safetensors seed1/memory.safetensors
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from tessera.evaluation import load
from tessera.files import write_json
from tessera.lab.evaluation.language import WITH_MEMORY, language, language_table
from tessera.lab.evaluation.language_plot import plot_language
from tessera.models import demo_memory_path, heldout_text

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--memory", type=Path, nargs="+", help="files of memories of the demo model  [default: the one that ships]"
    )
    parser.add_argument("--windows", type=int, help="sequences of held-out text  [default: all]")
    parser.add_argument("--tokens", type=int, default=2048, help="length of a sequence")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "language_memory.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "images" / "language_memory.png")
    options = parser.parse_args()
    rows, about = [], {}
    for seed, memory in enumerate(options.memory or [demo_memory_path()]):
        names = [WITH_MEMORY] if seed else None
        record = language(load(memory=memory), heldout_text(), tokens=options.tokens, count=options.windows, names=names)
        Console().print(language_table(record))
        rows += [{**row, "seed": seed} for row in record.pop("rows")]
        about = record
    write_json(options.json, {**about, "rows": rows})
    plot_language(rows, about["edges"], options.plot)
    Console().print(f"Saved {options.json} and {options.plot}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
