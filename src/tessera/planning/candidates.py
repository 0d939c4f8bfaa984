"""Which caches are tried where none are named."""

from __future__ import annotations

from tessera.planning.measured import frontier, measured

#: What every candidate keeps exact: attention sinks, and the newest tokens.
SINK, RECENT = "sink:4", "recent:128"
#: Codecs that people know from elsewhere, to be seen beside the best.
PEERS = ("q4_0", "kivi:4", "fp8")
#: Fewest tokens of a cache that forgets.
LEAST = 256


def keeping() -> tuple[str, ...]:
    """Specs that keep every token: exact, then each codec of the measured frontier and the known ones."""
    codecs = dict.fromkeys((*frontier(), *(codec for codec in PEERS if codec in measured())))
    return ("dense", *(f"{SINK} + {codec} + {RECENT}" for codec in codecs))


def forgetting(tokens: int) -> tuple[str, ...]:
    """Specs that keep about so many of the newest tokens: exact, and by the finest and the smallest codec of the frontier."""
    best = frontier()
    ends = dict.fromkeys((best[0], best[-1]))
    return (f"{SINK} + window:{tokens}", *(f"{SINK} + {codec}@{tokens} + {RECENT}" for codec in ends))


def sizes(context: int) -> tuple[int, ...]:
    """Numbers of tokens to be tried in caches that forget: powers of two below the context, the largest first."""
    return tuple(1 << power for power in range((context - 1).bit_length() - 1, LEAST.bit_length() - 2, -1))
