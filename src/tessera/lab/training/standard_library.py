"""Modules of the running Python's standard library, and which of them the demo model is not trained on.

The modules are chosen by a rule, not by a list, so that it holds for every version of Python: a module is held out when
the SHA-256 of its path inside the standard library is 0 modulo 20. Nothing here needs more than the standard library.

The text that the demo model is measured on does not change with Python: it is a file that ships, which `heldout_source` made
with Python 3.11.7; see `tessera.models.heldout_text`.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_MODULUS = 20
"""One module in this many is held out."""

SKIPPED_DIRECTORIES = frozenset({"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"})
"""Directories neither trained on nor held out: tests, an application, third parties."""


def standard_library() -> Path:
    """Return the directory that holds the standard library's source.

    Raises:
        FileNotFoundError: if this Python was installed without it (a zipped or frozen standard library).
    """
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "argparse.py").is_file():
        raise FileNotFoundError(
            f"The source of the standard library is not at {root}, so there is nothing to train on. "
            "Install Python with its .py files, or pass a text of your own."
        )
    return root


def standard_modules() -> Iterator[tuple[str, Path]]:
    """Yield ``(relative path with forward slashes, file)`` of every module of the standard library, sorted by path.

    Raises:
        FileNotFoundError: if the standard library's source is absent.
    """
    root = standard_library()
    files = ((file.relative_to(root), file) for file in root.rglob("*.py"))
    yield from sorted(
        (relative.as_posix(), file) for relative, file in files if SKIPPED_DIRECTORIES.isdisjoint(relative.parts[:-1])
    )


def _order(relative: str) -> int:
    return int.from_bytes(hashlib.sha256(relative.encode()).digest(), "big")


def is_held_out(relative: str) -> bool:
    """Say whether the module at this path (relative to the standard library, forward slashes) is held out."""
    return _order(relative) % HELD_OUT_MODULUS == 0


def heldout_files() -> list[Path]:
    """Return the held-out modules in the order of their hashes, so that any prefix is a mixture.

    Raises:
        FileNotFoundError: if the standard library's source is absent.
    """
    chosen = [(relative, file) for relative, file in standard_modules() if is_held_out(relative)]
    return [file for _, file in sorted(chosen, key=lambda item: _order(item[0]))]


def heldout_source() -> str:
    """Return the held-out modules of the running Python as one text, without those that are not UTF-8.

    Raises:
        FileNotFoundError: if the standard library's source is absent.
    """
    parts: list[bytes] = []
    for file in heldout_files():
        data = file.read_bytes()
        try:
            data.decode("utf-8")
        except UnicodeDecodeError:
            continue  # a few modules declare another encoding; the tokenizer was trained on UTF-8
        parts.append(data.replace(b"\r\n", b"\n"))
    return b"".join(parts).decode("utf-8")
