"""Specs that differ from layer to layer: `{0-1,-1: sink:4 + hqmq:5 + recent:128; *: sink:4 + hqmq:3 + recent:128}`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from tessera.tiers.spec import Spec
from tessera.tiers.spec import parse as parse_one

#: An example for errors.
EXAMPLE = "{0-1,-1: sink:4 + hqmq:5 + recent:128; *: sink:4 + hqmq:3 + recent:128}"
_RANGE = re.compile(r"(-?\d+)(?:-(-?\d+))?")


@dataclass(frozen=True)
class PerLayer:
    """A spec for each layer of a model, from the first choice that names the layer.

    Attributes:
        choices: layers as they are written, numbers and ranges separated by commas, negative ones counted from the last layer,
            "*" for all others; and the spec of these.
    """

    choices: tuple[tuple[str, Spec], ...]

    def __post_init__(self) -> None:
        if len({spec.tensor_cache for _, spec in self.choices}) > 1:
            raise ValueError("'tc' stands in the specs of all layers or of none")

    def of(self, layers: int) -> list[Spec]:
        """The spec of each layer.

        Raises:
            ValueError: for a layer that the model has not, or that no choice names.
        """
        found: dict[int, Spec] = {}
        for words, spec in self.choices:
            new = [number for number in _numbers(words, layers) if number not in found]
            if not new and words != "*":
                raise ValueError(f"{words!r} in {self} comes too late: the choices before it name these layers already")
            found.update(dict.fromkeys(new, spec))
        missing = [number for number in range(layers) if number not in found]
        if missing:
            raise ValueError(f"{self} names no spec for layers {missing[0]} to {missing[-1]}; end it with '*: ...'")
        return [found[number] for number in range(layers)]

    def with_sinks(self, sink: int) -> PerLayer:
        """Return the specs with this many sinks in the layers that compress tokens."""
        return PerLayer(tuple((words, s if s.codec is None else s.with_sinks(sink)) for words, s in self.choices))

    @property
    def specs(self) -> list[Spec]:
        """The specs of all choices."""
        return [spec for _, spec in self.choices]

    @property
    def sink(self) -> int:
        """First tokens that stay exact in every layer that compresses others."""
        return min((spec.sink for spec in self.specs if spec.codec is not None), default=0)

    @property
    def codec(self) -> str | None:
        """The first codec of the first choice that has one."""
        return next((spec.codec for spec in self.specs if spec.codec is not None), None)

    @cached_property
    def codecs(self) -> tuple[tuple[str, int | None], ...]:
        """The codecs of all choices."""
        return tuple(dict.fromkeys(pair for spec in self.specs for pair in spec.codecs))

    @property
    def window(self) -> int | None:
        """The shortest window of a choice that has one."""
        return min((spec.window for spec in self.specs if spec.window is not None), default=None)

    @property
    def dense(self) -> bool:
        """Whether all layers keep every token exactly."""
        return all(spec.dense for spec in self.specs)

    @property
    def bounded(self) -> bool:
        """Whether a layer drops tokens."""
        return any(spec.bounded for spec in self.specs)

    @property
    def tensor_cache(self) -> bool:
        """Whether what leaves is written into an attached memory."""
        return self.choices[0][1].tensor_cache

    def __str__(self) -> str:
        return "{" + "; ".join(f"{words}: {spec}" for words, spec in self.choices) + "}"


AnySpec = Spec | PerLayer


def parse(text: str | AnySpec) -> AnySpec:
    """Read a spec, see `tessera.tiers.spec.parse`, or one for each layer in braces.

    Raises:
        ValueError: naming the word that is wrong and the words that would be right.
    """
    if isinstance(text, PerLayer):
        return text
    if isinstance(text, Spec) or not isinstance(text, str) or not text.lstrip().startswith("{"):
        return parse_one(text)
    whole = text.strip()
    if not whole.endswith("}"):
        raise ValueError(f"the brace of {text!r} is not closed; specs for layers are written {EXAMPLE!r}")
    choices = []
    for choice in whole[1:-1].split(";"):
        words, colon, spec = choice.partition(":")
        words = "".join(words.split())
        if not colon or not all(word == "*" or _RANGE.fullmatch(word) for word in words.split(",")):
            raise ValueError(f"{choice.strip()!r} in {text!r} does not begin with layers and a colon, as in {EXAMPLE!r}")
        choices.append((words, parse_one(spec)))
    try:
        return PerLayer(tuple(choices))
    except ValueError as error:
        raise ValueError(f"{error} (in {text!r})") from None


def layer_specs(spec: AnySpec, layers: int) -> list[Spec]:
    """The spec of each layer of a model."""
    return spec.of(layers) if isinstance(spec, PerLayer) else [spec] * layers


def _numbers(words: str, layers: int) -> list[int]:
    found: list[int] = []
    for word in words.split(","):
        match = _RANGE.fullmatch(word)
        if match is None:
            found += range(layers)
            continue
        ends = [int(end) for end in match.groups() if end is not None]
        if any(not -layers <= end < layers for end in ends):
            raise ValueError(f"there is no layer {word!r}: the model has {layers}, 0 to {layers - 1}, or -{layers} to -1")
        first, last = (end % layers for end in (ends[0], ends[-1]))
        if last < first:
            raise ValueError(f"layers {word!r} are none, as the last comes before the first")
        found += range(first, last + 1)
    return found
