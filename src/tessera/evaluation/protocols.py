"""The two ways in which caches are compared, see `tessera.evaluation.compare`, and what specifications become in the second."""

from __future__ import annotations

from tessera.cache.spec import BLOCK, Spec, parse

PROTOCOLS = ("streaming", "paper")


def paper_spec(spec: str) -> str | None:
    """The specification as the paper protocol measures it: its codec and its sinks. None where there is no codec to measure.

    `recent` and a limit are left out, so that every token but the sinks is quantised when it is written.
    """
    parsed = parse(spec)
    if parsed.dense:
        return "dense"
    return None if parsed.codec is None else str(Spec(sink=parsed.sink, codec=parsed.codec))


def filler(spec: str, tokens: int) -> int:
    """Tokens that must follow a window of `tokens` so that its last block is whole and quantised, in the paper protocol."""
    parsed = parse(spec)
    return 0 if parsed.codec is None else -max(0, tokens - parsed.sink) % BLOCK
