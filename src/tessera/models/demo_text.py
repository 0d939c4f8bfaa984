"""Held-out text of the demo model: standard-library modules that its training never saw.

The modules are chosen by a rule, not by a list, so that it holds for every version of Python: a module is held out when
the SHA-256 of its path inside the standard library is 0 modulo 20. Nothing here needs more than the standard library.
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
            f"The source of the standard library is not at {root}, so there is no held-out text. "
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


def heldout_text(max_bytes: int | None = None) -> str:
    """Return the held-out modules as one text, the same on every call with the same Python.

    Args:
        max_bytes: stop after this many bytes of UTF-8 (a character cut in two is dropped); ``None`` gives everything.

    Raises:
        FileNotFoundError: if the standard library's source is absent.
        ValueError: if ``max_bytes`` is negative.
    """
    if max_bytes is not None and max_bytes < 0:
        raise ValueError(f"max_bytes must not be negative, got {max_bytes}")
    parts: list[bytes] = []
    size = 0
    for file in heldout_files():
        if max_bytes is not None and size >= max_bytes:
            break
        data = file.read_bytes()
        try:
            data.decode("utf-8")
        except UnicodeDecodeError:
            continue  # a few modules declare another encoding; the tokenizer was trained on UTF-8
        data = data.replace(b"\r\n", b"\n")
        parts.append(data)
        size += len(data)
    return b"".join(parts)[:max_bytes].decode("utf-8", errors="ignore")
