"""Measure the demo model's perplexity with the AVX-512 kernel's queries in one, two and three 8-bit limbs.

All rows use the streaming protocol of `tessera compare` and the same text; "float" is the reference in plain PyTorch.

Example:

    python benchmarks/query_limbs.py
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

from tessera.evaluation import compare, load, read_text
from tessera.evaluation.records import environment
from tessera.files import atomic_path
from tessera.kernels import cpu

ROOT = Path(__file__).resolve().parent.parent
WAYS = {"float": None, "8-bit": 1, "16-bit": 2, "24-bit": 3}


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--specs", nargs="+", default=("sink:4 + hqmq:4 + recent:64", "sink:4 + hqmq:3 + recent:64"))
    parser.add_argument("--count", type=int, default=4, help="windows of text")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "query_limbs.json")
    options = parser.parse_args()
    if cpu.MISSING is not None or cpu.levels()[-1] != "avx512":
        parser.error(f"this processor does not run the AVX-512 kernel: {cpu.MISSING or ', '.join(cpu.levels())}")
    source = load()
    text, name = read_text()
    rows: list[dict[str, Any]] = []
    for way, limbs in WAYS.items():
        with ExitStack() as stack:
            if limbs is None:
                stack.enter_context(patch.dict("os.environ", TESSERA_BACKEND="reference"))
            else:
                stack.enter_context(patch.object(cpu, "attend", partial(cpu.attend, limbs=limbs)))
            found = compare(source, text, options.specs, protocols=("streaming",), count=options.count, text_name=name)
        for row in found.rows:
            if row.spec != "dense":
                numbers = {key: getattr(row, key) for key in ("perplexity", "delta", "kl", "top1")}
                rows.append({"spec": row.spec, "queries": way, **numbers})
    record = {"environment": environment(), "text": name, "windows": options.count, "rows": rows}
    with atomic_path(options.json) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    table = Table("cache", "queries", "perplexity", "change", "KL", "top-1")
    for r in rows:
        cells = (f"{r['perplexity']:.4f}", f"{r['delta']:+.3%}", f"{r['kl']:.6f}", f"{r['top1']:.2%}")
        table.add_row(r["spec"], r["queries"], *cells)
    Console().print(table)
    Console().print(f"Saved {options.json}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
