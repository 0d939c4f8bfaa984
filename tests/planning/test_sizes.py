"""Commands accept numbers with units."""

from __future__ import annotations

from typing import Any

import pytest

from tessera.planning import parse_bytes, parse_rate, parse_tokens


@pytest.mark.parametrize(
    ("text", "wanted"),
    [(4096, 4096), ("4096", 4096), ("128k", 131072), ("128K", 131072), ("1M", 1 << 20), ("1.5k", 1536), (" 2 k ", 2048)],
)
def test_tokens(text: Any, wanted: int) -> None:
    assert parse_tokens(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (1000, 1000),
        ("8GiB", 8 << 30),
        ("8gib", 8 << 30),
        ("512MB", 512_000_000),
        ("512 MiB", 512 << 20),
        ("1.5KB", 1500),
        ("7b", 7),
        ("2TiB", 2 << 40),
    ],
)
def test_bytes(text: Any, wanted: int) -> None:
    assert parse_bytes(text) == wanted


def test_rates() -> None:
    assert parse_rate("50GB/s") == 50_000_000_000
    assert parse_rate("3.35TB/s") == 3_350_000_000_000
    assert parse_rate("1GiB/s") == 1 << 30


@pytest.mark.parametrize("text", ["", "k", "128q", "-5", "1e6", "8 GiB/s", "٣", "1..5k", True, 1.5, None, "0", "0.0001", -1, 0])
def test_wrong_numbers_are_refused_in_a_line_that_says_what_is_right(text: Any) -> None:
    for parse, good in ((parse_tokens, "128k"), (parse_bytes, "8GiB")):
        with pytest.raises(ValueError, match=good) as error:
            parse(text)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="50GB/s"):
        parse_rate("50GB")
