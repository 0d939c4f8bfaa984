"""The base class of configurations: frozen dataclasses that can be stored as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

C = TypeVar("C", bound="Options")


@dataclass(frozen=True)
class Options:
    """The base class of a module's configuration."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
        """Inverse of `to_dict`.

        Raises:
            ValueError: if a field is unknown or a value is invalid (the message names it).
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a {cls.__name__} is made from a table, got a {type(values).__name__}")
        names = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise ValueError(f"a {cls.__name__} has no {unknown[0]!r}; it has {', '.join(names)}")
        for field in fields(cls):
            given = values.get(field.name, field.default)
            if isinstance(field.default, bool) and not isinstance(given, bool):
                raise ValueError(f"{field.name} must be true or false, got {given!r}")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def check_words(self, words: Mapping[str, Sequence[str]]) -> None:
        """Refuse a field whose value is not one of its words."""
        for name, known in words.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {getattr(self, name)!r}")


def check_whole(name: str, value: object, least: int) -> None:
    """Refuse a field that is not a whole number, or is too small."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
