"""Codecs by name: `get("hqmq:4")`."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from tessera.codecs.base import Codec

_FACTORIES: dict[str, tuple[Callable[[str], Codec], tuple[str, ...]]] = {}


def register(name: str, examples: tuple[str, ...]) -> Callable[[Callable[[str], Codec]], Callable[[str], Codec]]:
    """Register ``factory(argument) -> Codec`` under `name`. `examples` are specs shown in errors and in the docs."""

    def add(factory: Callable[[str], Codec]) -> Callable[[str], Codec]:
        _FACTORIES[name] = (factory, examples)
        return factory

    return add


def names() -> tuple[str, ...]:
    """The registered names."""
    return tuple(_FACTORIES)


def examples() -> tuple[str, ...]:
    """List one or more example specs of every codec."""
    return tuple(spec for _, specs in _FACTORIES.values() for spec in specs)


def get(spec: str) -> Codec:
    """The codec that `spec` names: a name, then, after a colon, its argument; or two of these in brackets, see `codecs.pair`.

    Raises:
        ValueError: naming the word that is wrong and the words that would be right.
    """
    # Pairs in brackets are registered under the opening bracket.
    name, _, argument = ("(", "", spec.strip()[1:]) if spec.strip().startswith("(") else spec.strip().partition(":")
    if name not in _FACTORIES:
        near = difflib.get_close_matches(name, _FACTORIES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown codec {name!r} in {spec!r}{hint} There are: {', '.join(examples())}")
    factory, good = _FACTORIES[name]
    try:
        return factory(argument)
    except ValueError as error:
        raise ValueError(f"{error} (in {spec!r}; examples: {', '.join(good)})") from None
