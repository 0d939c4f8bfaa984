"""Choice of the memory that a command attaches for a cache with `tc`."""

from __future__ import annotations

from pathlib import Path


def memory_for(spec: str, memory: Path | None, model: str | None) -> Path | None:
    """Return the memory's file: the given one or, for the demo model (`model` is None), its own; None without "tc".

    Raises:
        ValueError: if one is named for a cache without "tc".
    """
    from tessera.models import demo_memory_path
    from tessera.tiers.per_layer import parse

    wanted = parse(spec).tensor_cache
    if memory is not None and not wanted:
        raise ValueError(f"--memory is for a cache with a memory; {spec!r} has no 'tc'")
    return demo_memory_path() if memory is None and model is None and wanted else memory
