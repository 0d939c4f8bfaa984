"""Numbers of tokens, of bytes and of bytes a second as people write them: `128k`, `8GiB`, `50GB/s`."""

from __future__ import annotations

import re

#: Tokens are counted by 1,024, as the contexts of models are.
TOKENS = {"": 1, "k": 1 << 10, "m": 1 << 20}
#: Bytes: by 1,024 with an i, by 1,000 without.
BYTES = {"b": 1} | {
    f"{letter}{i}b": (1024 if i else 1000) ** power
    for power, letter in enumerate("kmgt", start=1)
    for i in ("i", "")  # KiB, KB
}
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z/]*)", re.IGNORECASE)


def parse_tokens(text: int | str) -> int:
    """A number of tokens, at least 1.

    Args:
        text: a whole number, or a number with k or M for 1,024 or 1,048,576 of them: 4096, "128k", "1M".

    Raises:
        ValueError: for anything else, naming what would be right.
    """
    return _parse(text, "tokens", TOKENS, "4096, 128k or 1M")


def parse_bytes(text: int | str) -> int:
    """A number of bytes, at least 1.

    Args:
        text: a whole number of bytes, or a number with a unit: "8GiB" is 8 · 1024³ bytes, "512MB" 512 · 1000².

    Raises:
        ValueError: for anything else, naming what would be right.
    """
    return _parse(text, "bytes", {"": 1, **BYTES}, "8GiB, 512MB or 1000000")


def parse_rate(text: int | str) -> int:
    """Bytes a second, at least 1.

    Args:
        text: a whole number of bytes a second, or a number with a unit: "50GB/s", "3.35TB/s".

    Raises:
        ValueError: for anything else, naming what would be right.
    """
    return _parse(text, "bytes a second", {"": 1, **{f"{unit}/s": size for unit, size in BYTES.items()}}, "50GB/s or 800MiB/s")


def _parse(text: int | str, what: str, units: dict[str, int], good: str) -> int:
    if isinstance(text, bool) or not isinstance(text, int | str):
        raise ValueError(f"{text!r} is no number of {what}; write it like {good}")
    found = _NUMBER.fullmatch(str(text).strip())
    if found is None or not str(text).isascii() or found[2].lower() not in units:
        raise ValueError(f"{text!r} is no number of {what}; write it like {good}")
    whole, _, fraction = found[1].partition(".")
    # In whole numbers, so that no large count is rounded.
    size = int(whole + fraction) * units[found[2].lower()] // 10 ** len(fraction)
    if size < 1:
        raise ValueError(f"{text!r} is less than 1 of {what}; write it like {good}")
    return size
