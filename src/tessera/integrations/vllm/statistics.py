"""Key statistics in an engine: one file serves all requests, because they share pages.

The file is what `tessera stats` writes. See `docs/keys_as_queries_see_them.md`.
"""

from __future__ import annotations

from functools import cache

from tessera.codecs.channel_stats import KeyStats, load_stats


@cache
def load(path: str) -> tuple[KeyStats | None, ...]:
    """Load the statistics of each layer; a file is read once in a process."""
    return tuple(load_stats(path))


def of_layer(path: str, number: int, layers: int, kv_heads: int, head_dim: int, rank: int = 0, ranks: int = 1) -> KeyStats:
    """Return the statistics of a rank's key heads of a layer.

    Args:
        path: path of the file.
        number: number of the layer.
        layers: layers of the model.
        kv_heads: key heads of the layer on this rank; with more ranks than heads, neighbouring ranks have the same.
        head_dim: numbers of a key.
        rank: index of this rank among the `ranks` that share the heads of a layer.
        ranks: how many.

    Raises:
        ValueError: if they are of another model, in one line.
    """
    known = load(path)
    if len(known) != layers:
        raise ValueError(f"the statistics in {path} are of a model of {len(known)} layers; yours has {layers}")
    found = known[number]
    if found is None:
        raise ValueError(f"there are no statistics of layer {number} in {path}")
    heads = found.sizes.shape[1]
    repeated = kv_heads == 1 and ranks > heads and ranks % heads == 0
    if found.sizes.shape[2] != head_dim or not (heads == kv_heads * ranks or repeated):
        raise ValueError(
            f"layer {number} of the statistics in {path} has {heads} key heads of {found.sizes.shape[2]}; "
            f"yours has {kv_heads * ranks} of {head_dim}"
        )
    first = rank * heads // ranks
    return KeyStats(found.sizes[:, first : first + kv_heads])
