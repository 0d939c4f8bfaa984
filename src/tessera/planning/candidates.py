"""The default candidates of a plan."""

from __future__ import annotations

from tessera.planning.measured import frontier, measured

#: The exact tiers of every candidate: attention sinks, and the newest tokens.
SINK, RECENT = "sink:4", "recent:128"
#: Widely used codecs, for comparison with the best.
PEERS = ("q4_0", "kivi:4", "fp8")
#: Smallest number of tokens of a bounded cache.
LEAST = 256


def keeping() -> tuple[str, ...]:
    """List specs that keep every token: exact, then each codec of the measured frontier and the known ones."""
    codecs = dict.fromkeys((*frontier(), *(codec for codec in PEERS if codec in measured())))
    return ("dense", *(f"{SINK} + {codec} + {RECENT}" for codec in codecs))


def forgetting(tokens: int) -> tuple[str, ...]:
    """List specs that keep about so many newest tokens: exact, and by the finest and the smallest codec of the frontier."""
    best = frontier()
    ends = dict.fromkeys((best[0], best[-1]))
    return (f"{SINK} + window:{tokens}", *(f"{SINK} + {codec}@{tokens} + {RECENT}" for codec in ends))


def sizes(context: int) -> tuple[int, ...]:
    """List sizes to try for bounded caches: powers of two below the context, the largest first."""
    return tuple(1 << power for power in range((context - 1).bit_length() - 1, LEAST.bit_length() - 2, -1))
