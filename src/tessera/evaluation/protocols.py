"""The two protocols of comparisons, see `tessera.evaluation.comparison`, and the specifications of the second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tessera import codecs
from tessera.cache import BLOCK, Cache, Prefill, Spec
from tessera.codecs.channel_stats import KeyStats
from tessera.tiers.per_layer import PerLayer, parse

PROTOCOLS = ("streaming", "paper")


def paper_spec(spec: str) -> str | None:
    """Reduce a specification to its codec and sinks for the paper protocol. None if it does not have exactly one codec.

    `recent` and a limit are left out, so that every token but the sinks is quantised when it is written.
    """
    parsed = parse(spec)
    if parsed.dense:
        return "dense"
    if isinstance(parsed, PerLayer):
        if len({each.sink for each in parsed.specs if each.codec is not None}) > 1:
            return None  # no single text fills the last blocks of all layers
        own = [(words, paper_spec(str(each))) for words, each in parsed.choices]
        return None if any(each is None for _, each in own) else str(parse("{" + "; ".join(f"{w}: {e}" for w, e in own) + "}"))
    return None if parsed.codec is None or parsed.older else str(Spec(sink=parsed.sink, codec=parsed.codec))


def filler(spec: str, tokens: int) -> int:
    """Return how many tokens must follow a window of `tokens` so that its last block is quantised, in the paper protocol."""
    parsed = parse(spec)
    return 0 if parsed.codec is None else -max(0, tokens - parsed.sink) % BLOCK


def new_cache(spec: str, model: Any, prefill: Prefill, stats: Sequence[KeyStats | None] | None) -> Cache:
    """Make a cache for a model, without statistics where its codec does not use them."""
    useful = any(codecs.get(codec).weighs for codec, _ in parse(spec).codecs)
    return Cache(spec, model, prefill=prefill, stats=stats if useful else None)
