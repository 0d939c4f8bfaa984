"""The grammar of specifications: words joined by `+`, each a name and optionally a number after a colon."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import NoReturn


def words(text: str, examples: Iterable[str], what: str = "word") -> list[str]:
    """Split a specification into its words, in order, without spaces.

    Args:
        text: words joined by `+`.
        examples: examples of words, which the error shows.
        what: a word stands for.

    Raises:
        ValueError: where there is nothing between two `+`.
    """
    found = ["".join(word.split()) for word in text.split("+")]
    if not all(found):
        raise ValueError(f"there is an empty {what} in {text!r}; write {what}s like {_listed(examples)} with '+' between them")
    return found


def count(argument: str, word: str, example: str, text: str, least: int = 0, of: str = "tokens") -> int:
    """Read the whole number after the colon of a word.

    Args:
        argument: the text after the colon.
        word: the word with it.
        example: example of the word, which the error shows.
        text: the specification, which the error names.
        least: the smallest valid number.
        of: what is counted.

    Raises:
        ValueError: for anything else.
    """
    if not argument.isascii() or not argument.isdigit() or int(argument) < least:
        at_least = f" of at least {least}" if least else ""
        raise ValueError(f"{word!r} in {text!r} needs a whole number of {of}{at_least}, as in {example!r}; got {argument!r}")
    return int(argument)


def unknown(name: str, text: str, names: Iterable[str], examples: Iterable[str], what: str = "word") -> NoReturn:
    """Refuse an unknown name, naming the nearest one and all that exist.

    Args:
        name: name of the word.
        text: the specification.
        names: the existing names.
        examples: examples of words with these names.
        what: a word stands for.

    Raises:
        ValueError: always.
    """
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"unknown {what} {name!r} in {text!r}{hint} There are: {_listed(examples)}")


def one(text: str, examples: Mapping[str, str], of: str = "tokens") -> tuple[str, int | None]:
    """Read the name and the number of a specification of one word.

    Args:
        text: the specification.
        examples: an example of a word for each name; a name whose example has a colon takes a number of at least 1.
        of: what such a number counts.

    Raises:
        ValueError: for more than one word, another name, a number that is missing, or one that is not wanted.
    """
    found = words(text, examples.values())
    if len(found) > 1:
        raise ValueError(f"{text!r} has {len(found)} words and may have one of {_listed(examples.values())}")
    name, colon, argument = found[0].partition(":")
    if name not in examples:
        unknown(name, text, examples, examples.values())
    if ":" in examples[name]:
        return name, count(argument, found[0], examples[name], text, 1, of)
    if colon:
        raise ValueError(f"{name!r} takes no number, got {text!r}")
    return name, None


def _listed(examples: Iterable[str]) -> str:
    return ", ".join(map(repr, examples))
