"""The registry of tiers that are added to the grammar, each with its word; CONTRIBUTING shows how to add one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tessera.tiers import Tier


class AddedTier(NamedTuple):
    """A word of the grammar.

    Attributes:
        make: makes a tier from the text behind the word's colon; raises `ValueError` saying what is wrong with it.
        example: example of the word, for errors.
    """

    make: Callable[[str], Tier]
    example: str


_ADDED: dict[str, AddedTier] = {}


def register(name: str, example: str) -> Callable[[Callable[[str], Tier]], Callable[[str], Tier]]:
    """Register ``make(argument) -> Tier`` as the word `name`, which stands for a tier behind the codecs of a spec.

    Args:
        name: name of the word, without a colon.
        example: example of the word with its argument, which errors show.
    """

    def add(make: Callable[[str], Tier]) -> Callable[[str], Tier]:
        _ADDED[name] = AddedTier(make, example)
        return make

    return add


def examples() -> dict[str, str]:
    """List an example of each word."""
    return {name: added.example for name, added in _ADDED.items()}


def make(word: str) -> Tier:
    """Make a new tier from a word with its argument, such as "stride:4".

    Raises:
        ValueError: for an argument that is wrong.
    """
    name, _, argument = word.partition(":")
    added = _ADDED[name]
    try:
        return added.make(argument)
    except ValueError as error:
        raise ValueError(f"{error} (in {word!r}; for example {added.example!r})") from None
