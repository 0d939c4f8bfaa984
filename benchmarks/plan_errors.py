"""Write the table of errors by which `tessera plan` ranks caches: src/tessera/planning/measured.json.

It is taken from docs/results/real_models/paper.json: a pretrained model whose keys and values, except those of four sinks,
are quantised before they are read. Nothing is measured here.

Example:

    python benchmarks/plan_errors.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tessera.evaluation.records import load_all
from tessera.files import write_json
from tessera.planning.measured import FILE
from tessera.tiers.spec import parse

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "docs/results/real_models/paper.json"


def table() -> dict[str, Any]:
    """Return the record to write: its source, and for each codec its bits, KL and standard error."""
    found = load_all(ROOT / SOURCE)[0]
    rows = [
        {"codec": codec, "bits": row.codec_bits, "kl": row.kl, "kl_error": row.kl_error}
        for row in found.rows
        if (codec := parse(row.spec).codec) is not None
    ]
    about = {"source": SOURCE, "model": found.model, "text": found.text, "tokens": found.tokens, "context": found.context}
    return {**about, "codecs": sorted(rows, key=lambda row: (row["kl"], row["bits"]))}


def main() -> None:
    """Write the record."""
    record = table()
    write_json(FILE, record)
    print(f"{FILE}: {len(record['codecs'])} codecs")


if __name__ == "__main__":
    main()
