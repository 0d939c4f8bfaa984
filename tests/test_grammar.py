"""One grammar reads all specifications, and names a mistake and its correction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tessera import grammar
from tessera.cache import parse
from tessera.lab.models.backbones import BackboneConfig
from tessera.lab.models.small_gpt import read_attention
from tessera.lab.models.vit import read_frames

READERS: dict[str, Callable[[str], Any]] = {
    "Cache": parse,
    "GPT": read_attention,
    "ViT": read_frames,
    "backbone": lambda text: BackboneConfig(features=2, classes=2, attention=text).window(),
}


@pytest.mark.parametrize("reader", READERS)
def test_spaces_do_not_matter_and_numbers_are_numbers(reader: str) -> None:
    read = READERS[reader]
    assert read(" window : 8 ") == read("window:8")
    for wrong in ("window:x", "window:0", "window:", "window", "window:-1", "window:٣"):
        with pytest.raises(ValueError, match=r"window"):
            read(wrong)


@pytest.mark.parametrize("reader", READERS)
def test_a_word_that_is_unknown_is_named_with_the_nearest(reader: str) -> None:
    with pytest.raises(ValueError, match=r"unknown \w+ 'windo' in 'windo:8'; did you mean 'window'\? There are: .*'window:"):
        READERS[reader]("windo:8")


def test_words_keep_their_order_and_none_is_empty() -> None:
    assert grammar.words("b : 2 + a", ()) == ["b:2", "a"]
    for wrong in ("", "a +", "+ a", "a + + b"):
        with pytest.raises(ValueError, match="empty word"):
            grammar.words(wrong, ("a",))


def test_one_word_is_one() -> None:
    with pytest.raises(ValueError, match="has 2 words"):
        grammar.one("frame + window:4", {"frame": "frame", "window": "window:4"})
    with pytest.raises(ValueError, match="'frame' takes no number"):
        grammar.one("frame:3", {"frame": "frame"})
