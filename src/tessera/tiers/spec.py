"""The spec grammar: `sink:4 + hqmq:4@32768 + recent:128`, `sink:4 + (k=q8_0,v=hqmq:3) + recent:128`."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from tessera import codecs, grammar
from tessera.tiers import BLOCK, added_tiers

#: The purpose of each tier that is no codec, with the example that errors show.
TIERS = {
    "sink": ("sink:4", "the first tokens, exact for ever"),
    "recent": ("recent:128", "the newest tokens, exact"),
    "window": ("window:512", "the newest tokens, exact, and nothing behind them"),
    "dense": ("dense", "every token, exact"),
    "tc": ("tc", "a Tensor Cache of what was dropped"),
}


@dataclass(frozen=True)
class Spec:
    """The tiers of a cache.

    Attributes:
        sink: number of first tokens that stay exact for ever.
        recent: number of newest tokens that stay exact at least; up to `BLOCK` - 1 more wait there until a block is whole.
        codec: spec of the codec that holds the tokens between the two, as the codec itself writes it, or None.
        codec_limit: number of tokens that the codec tier holds at most; the oldest whole blocks go on to the next codec, or are
            dropped. None: no limit.
        older: further codecs and their limits, each for the tokens past the limit of the one before.
        window: a query sees this many newest tokens, itself included, and the sinks, and nothing else. None: no window.
        others: words of tiers that were added to the grammar, in the order in which tokens come to them, behind the codecs.
        tops: codecs whose tokens are read sparsely, each with the number of them that a query reads at most.
        dense: keep every token exactly.
        tensor_cache: what leaves the window, or the last codec, is written into the Tensor Cache that `tessera.attach`
            has given to the model.
    """

    sink: int = 0
    recent: int = 0
    codec: str | None = None
    codec_limit: int | None = None
    window: int | None = None
    dense: bool = False
    tensor_cache: bool = False
    older: tuple[tuple[str, int | None], ...] = ()
    others: tuple[str, ...] = ()
    tops: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        for name in ("sink", "recent"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.dense:
            self._alone("dense", "it keeps every token exactly already", sink=self.sink, recent=self.recent)
        if self.window is not None:
            if self.window < 1:
                raise ValueError(f"window needs at least 1 token, got {self.window}")
            self._alone("window", "it is exact and nothing lies behind it; only 'sink' may join it", recent=self.recent)
        if self.tensor_cache and not self.bounded:
            raise ValueError(
                "'tc' absorbs what leaves a window, or a codec that holds so many tokens at most: add 'window:512', or what "
                "the memory was made for, or 'hqmq:4@32768'"
            )
        if self.others:
            self._alone_with_others()
        if self.codec is not None:
            self._chain()
        elif self.codec_limit is not None or self.tops:
            raise ValueError("codec_limit or tops without a codec")
        elif self.older:
            raise ValueError("older codecs without a first one")
        elif not self.dense and self.window is None and not self.others:
            raise ValueError(
                "a spec must say what becomes of the tokens that leave 'recent': add a codec, as in "
                f"'{codec_examples()[0]}', or write 'window:{self.recent or 512}' to drop them, or 'dense' to keep them"
            )

    def _alone_with_others(self) -> None:
        first = repr(self.others[0])
        if self.dense or self.window is not None or self.tensor_cache:
            word = "dense" if self.dense else "tc" if self.tensor_cache else "window"
            raise ValueError(f"{first} takes what leaves 'recent' or a codec, so it does not go together with {word!r}")
        if self.codec is not None and self.codecs[-1][1] is None:
            raise ValueError(f"{self.codecs[-1][0]!r} keeps every token, so {first} behind it would get none; give it a limit")

    def with_sinks(self, sink: int) -> Spec:
        """Return the spec with this many sinks."""
        return replace(self, sink=sink)

    def _chain(self) -> None:
        """Check the codecs, and name them as they name themselves."""
        assert self.codec is not None
        named = [(codecs.get(spec), limit) for spec, limit in ((self.codec, self.codec_limit), *self.older)]
        for found, limit in named:
            if BLOCK % found.group:
                raise ValueError(
                    f"{found.spec!r} encodes {found.group} tokens together, which does not divide the {BLOCK} tokens that are "
                    "compressed at a time"
                )
            if limit is not None and limit < BLOCK:
                raise ValueError(f"'{found.spec}@{limit}' is less than one block; the least is '{found.spec}@{BLOCK}'")
        specs = [found.spec for found, _ in named]
        for found, limit in named[:-1]:
            if limit is None:
                raise ValueError(
                    f"{found.spec!r} keeps every token, so {specs[-1]!r} behind it would get none; give it a limit, as in "
                    f"'{found.spec}@32768'"
                )
        for spec in specs:
            if specs.count(spec) > 1:
                raise ValueError(f"{spec!r} stands behind itself; give it the sum of the limits once")
        object.__setattr__(self, "tops", tuple((codecs.get(spec).spec, top) for spec, top in self.tops))
        for spec, top in self.tops:
            if spec not in specs:
                raise ValueError(f"'/top:{top}' is for {spec!r}, which this spec has not")
            if not codecs.get(spec).side("key").summarises:
                raise ValueError(
                    f"'{spec}/top:{top}': {spec!r} keeps no mean of each block of keys, by which blocks to read are chosen; "
                    "hqmq:3, hqmq:4 and hqmq:5 do"
                )
            if top < BLOCK or top % BLOCK:
                raise ValueError(f"'{spec}/top:{top}': tokens are read in blocks of {BLOCK}; give a multiple, such as 2048")
        object.__setattr__(self, "codec", specs[0])
        object.__setattr__(self, "older", tuple((found.spec, limit) for found, limit in named[1:]))

    @property
    def codecs(self) -> tuple[tuple[str, int | None], ...]:
        """The codecs, from that of the newest tokens to that of the oldest, each with its limit."""
        return () if self.codec is None else ((self.codec, self.codec_limit), *self.older)

    def _alone(self, name: str, why: str, **others: int) -> None:
        clash = [key for key, value in others.items() if value]
        if self.codec is not None:
            clash.append(self.codec)
        if name == "dense" and self.window is not None:
            clash.append("window")
        if clash:
            raise ValueError(f"{name!r} and {clash[0]!r} contradict each other: {name} - {why}")

    def top(self, codec: str) -> int | None:
        """Return how many tokens of a codec a query reads at most; None: all."""
        return dict(self.tops).get(codec)

    @property
    def exact(self) -> bool:
        """Whether no token is ever changed or dropped."""
        return self.dense

    @property
    def bounded(self) -> bool:
        """Whether the cache stops growing, or drops the keys of some tokens."""
        return self.window is not None or bool(self.others) or (self.codec is not None and self.codecs[-1][1] is not None)

    def __str__(self) -> str:
        words = []
        if self.sink:
            words.append(f"sink:{self.sink}")
        tops = {codec: f"/top:{top}" for codec, top in self.tops}
        words += [(codec if limit is None else f"{codec}@{limit}") + tops.get(codec, "") for codec, limit in self.codecs]
        words += self.others
        if self.recent:
            words.append(f"recent:{self.recent}")
        if self.window is not None:
            words.append(f"window:{self.window}")
        if self.dense:
            words.append("dense")
        if self.tensor_cache:
            words.append("tc")
        return " + ".join(words)


def codec_examples() -> tuple[str, ...]:
    """Specs of the registered codecs, for errors."""
    return codecs.examples() or ("hqmq:4",)


def parse(text: str | Spec) -> Spec:
    """Read a spec.

    Args:
        text: tiers joined by `+`, in any order, each `name` or `name:argument`, or codecs for keys and for values in brackets;
            spaces do not matter. Of several codecs the first has the newest tokens, and each takes the tokens past the limit of
            the one before. A `Spec` is returned as it is.

    Raises:
        ValueError: naming the word that is wrong and the words that would be right.
    """
    if isinstance(text, Spec):
        return text
    if not isinstance(text, str):
        raise TypeError(f"a spec is a string such as 'sink:4 + {codec_examples()[0]} + recent:128', not {text!r}")
    found: dict[str, Any] = {}
    for word in grammar.words(text, _choices(), "tier"):
        fields = _tier(word, text)
        found["tops"] = (*found.get("tops", ()), *fields.pop("tops", ()))
        if "codec" in fields and "codec" in found:
            found["older"] = (*found.get("older", ()), (fields["codec"], fields.get("codec_limit")))
            continue
        if "others" in fields:
            found["others"] = (*found.get("others", ()), *fields["others"])
            continue
        for key, value in fields.items():
            if key in found:
                raise ValueError(f"{word!r} in {text!r} is a second {key}; a spec has one of each tier at most")
            found[key] = value
    try:
        return Spec(**found)
    except ValueError as error:
        raise ValueError(f"{error} (in {text!r})") from None


def _tier(word: str, text: str) -> dict[str, Any]:
    """Parse one tier into fields of `Spec`."""
    if word.startswith("("):
        return _codec(word, text)
    name, colon, argument = word.partition(":")
    if name in ("dense", "tc"):
        if colon:
            raise ValueError(f"{name!r} takes no argument, got {word!r} in {text!r}")
        return {"dense" if name == "dense" else "tensor_cache": True}
    if name in TIERS:
        return {name: grammar.count(argument, word, TIERS[name][0], text)}
    if name in added_tiers.examples():
        added_tiers.make(word)  # which refuses an argument that is wrong
        return {"others": (word,)}
    if re.split("[@/]", name)[0] in codecs.names():
        return _codec(word, text)
    grammar.unknown(name, text, (*TIERS, *added_tiers.examples(), *codecs.names()), _choices(), "tier")


def _codec(word: str, text: str) -> dict[str, Any]:
    """Parse a codec and its limit into fields of `Spec`."""
    word, slash, rule = word.partition("/")
    codec, at, limit = word.partition("@")
    if at and codec.startswith("(") and not codec.endswith(")"):
        whole = "".join(part.partition("@")[0] for part in re.split("(?=[,)])", word))
        raise ValueError(f"{word!r} in {text!r}: a limit is for keys and values together, as in '{whole}@32768'")
    codecs.get(codec)
    fields: dict[str, Any] = {"codec": codec}
    if at:
        fields["codec_limit"] = grammar.count(limit, word, f"{codec}@32768", text)
    if slash:
        kind, _, top = rule.partition(":")
        if kind != "top":
            raise ValueError(f"'{word}/{rule}' in {text!r}: behind '/' stands how much of it is read, as in '{codec}/top:2048'")
        fields["tops"] = ((codec, grammar.count(top, f"{word}/{rule}", f"{codec}/top:2048", text)),)
    return fields


def _choices() -> tuple[str, ...]:
    return (*(example for example, _ in TIERS.values()), *added_tiers.examples().values(), *codec_examples())
