"""Held-out text of the demo model: standard-library modules that its training never saw, as a file that ships.

The file holds 31 modules of Python 3.11.7, the version that everything in `docs/` was measured with, chosen and put in order
by `tessera.lab.training.standard_library`. It is the same whatever Python runs, so figures that are measured on it can be
compared. Its licence is Python's, which lies beside it.
"""

from __future__ import annotations

from pathlib import Path

_FILE = Path(__file__).parent / "demo" / "held_out.txt"


def heldout_text(max_bytes: int | None = None) -> str:
    """Return the held-out modules as one text, 593,114 bytes, the same on every machine.

    Args:
        max_bytes: stop after this many bytes of UTF-8 (a character cut in two is dropped); ``None`` gives everything.

    Raises:
        FileNotFoundError: if the file is not installed.
        ValueError: if ``max_bytes`` is negative.
    """
    if max_bytes is not None and max_bytes < 0:
        raise ValueError(f"max_bytes must not be negative, got {max_bytes}")
    if not _FILE.is_file():
        raise FileNotFoundError(f"The held-out text is not at {_FILE}. Reinstall tessera, or pass a text of your own.")
    # A checkout may have converted the line ends.
    data = _FILE.read_bytes().replace(b"\r\n", b"\n")
    return data[:max_bytes].decode("utf-8", errors="ignore")
