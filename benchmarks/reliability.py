"""Count the tests behind each promise of docs/reliability.md, for its table.

Writes docs/results/reliability.json: for each promise the files that test it, how many of their cases run always and how many
only among the slow tests, and the repetitions within a case.

Example:

    python benchmarks/reliability.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tessera.files import atomic_path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "results" / "reliability.json"

#: What is promised, and the files that test it.
PROMISES: dict[str, tuple[str, ...]] = {
    "any sequence of calls and changes gives what the definition says": ("tests/machine/test_machine.py",),
    "the definition itself is right": ("tests/machine/test_oracle.py",),
    "tiers pass tokens on, also one that is added, read sparsely or kept in files": (
        "tests/cache/test_chain.py",
        "tests/cache/test_dissolved.py",
        "tests/cache/test_added_tier.py",
        "tests/cache/test_sparse_reading.py",
        "tests/cache/test_offload.py",
    ),
    "masks are honoured exactly or refused": ("tests/cache/test_masks.py", "tests/cache/test_tensor_memory_calls.py"),
    "the result does not depend on the cut of calls, the batch or padding": ("tests/cache/test_invariance.py",),
    "generation is that of transformers": ("tests/cache/test_generation.py", "tests/cache/test_recording.py"),
    "families are served right or refused": ("tests/test_every_family.py", "tests/cache/test_families.py"),
    "what cannot work is refused by cause": ("tests/cache/test_refusals.py",),
    "wrapped, compiled, copied and pickled": ("tests/cache/test_wrapped.py",),
    "dtypes, autocast and devices": ("tests/cache/test_dtypes_devices.py", "tests/codecs/test_precision.py"),
    "adapters around a memory": ("tests/cache/test_lora.py",),
    "threads do not notice each other": ("tests/machine/test_threads.py",),
    "files: what is saved loads, what is damaged is refused": ("tests/test_hostile_files.py", "tests/cache/test_save_load.py"),
    "memory stays flat": ("tests/test_soak.py",),
    "attached memories": (
        "tests/cache/test_attached_memory.py",
        "tests/cache/test_attached_tensor_memory.py",
        "tests/cache/test_attached_encoders.py",
        "tests/cache/test_truncated_bptt.py",
    ),
    "codecs keep their laws": ("tests/codecs",),
    "kernels equal the definition": ("tests/kernels", "tests/test_attention.py"),
}


class _Collected:
    """A pytest plugin that records the collected tests."""

    def __init__(self) -> None:
        self.items: list[tuple[str, bool]] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = count_items(session.items)


def count_items(items: list[pytest.Item]) -> list[tuple[str, bool]]:
    """Return the file of each case and whether it is slow."""
    return [(item.path.relative_to(ROOT).as_posix(), "slow" in item.keywords) for item in items]


def rows(items: list[tuple[str, bool]]) -> list[dict[str, Any]]:
    """Return a row for each promise, and one for all other tests."""
    found, rest = [], list(items)
    for promise, places in PROMISES.items():
        own = [item for item in items if item[0].startswith(places)]
        rest = [item for item in rest if not item[0].startswith(places)]
        found.append({"promise": promise, "tests": list(places), **_counts(own)})
    return [*found, {"promise": "everything else", "tests": ["tests"], **_counts(rest)}]


def _counts(items: list[tuple[str, bool]]) -> dict[str, int]:
    slow = sum(slow for _, slow in items)
    return {"always": len(items) - slow, "slow": slow}


def main() -> None:
    """Collect the tests and write the counts."""
    collected = _Collected()
    pytest.main(["--collect-only", "-q", "--no-header", "-p", "no:cacheprovider", str(ROOT / "tests")], plugins=[collected])
    with atomic_path(OUT) as temporary:
        Path(temporary).write_text(json.dumps({"rows": rows(collected.items)}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
