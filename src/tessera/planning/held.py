"""The exact bytes of a cache after a number of tokens, without allocating it; only this file of the planner builds caches.

The cache's own code runs on tensors without data (on PyTorch's device "meta"), so rounding, free room and statistics follow the
cache's own rules. After some thousands of tokens a cache grows by the same bytes with every page, or not at all; beyond that
the bytes are extrapolated.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tessera import codecs
from tessera.cache_layers.group import SequenceGroup
from tessera.codecs import Codec, Packed, Role
from tessera.tiers import PAGE, QuantizedTier
from tessera.tiers.learning import LEARN
from tessera.tiers.per_layer import AnySpec, layer_specs
from tessera.tiers.policy import RetentionPolicy
from tessera.tiers.spec import Spec

ROLES: tuple[Role, ...] = ("key", "value")
#: (kv_heads, head_dim) of a layer, and the window of its own attention or None, as `read_config` gives them.
LayerShape = tuple[tuple[int, int], int | None]


@dataclass(frozen=True)
class Held:
    """Bytes of a cache.

    Attributes:
        nbytes: bytes of all tensors, the free room of buffers included: what `Cache.report().nbytes` says.
        read: bytes of the keys and values themselves that attention reads for the next token of every row.
    """

    nbytes: int
    read: int


def held(
    spec: AnySpec, layers: Sequence[LayerShape], dtype: torch.dtype, batch: int, lengths: Iterable[int]
) -> dict[int, Held]:
    """Count the bytes of a cache after each number of tokens, read in one call or in calls of whole pages of 1,024.

    Other cuts of calls can leave up to 64 tokens more of free room in each layer.

    Args:
        spec: specification of the cache, without "tc"; perhaps one for each layer.
        layers: layers of the model.
        dtype: dtype of its keys and values.
        batch: rows, all without padding.
        lengths: numbers of tokens, at least 1 each.

    Raises:
        ValueError: for a codec whose bytes depend on what is encoded, or that is for other heads.
    """
    start = steady_after(spec, layers)
    wanted = {n: (n if n <= start + PAGE else start + (n - start) % PAGE) for n in lengths}
    asked = sorted({m for n, m in wanted.items()} | {m + PAGE for n, m in wanted.items() if m != n})
    totals = dict.fromkeys(asked, (0, 0))
    for (own, layer), count in Counter(zip(layer_specs(spec, len(layers)), layers, strict=True)).items():
        for n, found in _replay(own, layer, dtype, batch, asked).items():
            totals[n] = totals[n][0] + count * found.nbytes, totals[n][1] + count * found.read
    result = {}
    for n, m in wanted.items():
        pages, (nbytes, read) = (n - m) // PAGE, totals[m]
        if pages:
            more = totals[m + PAGE]
            nbytes, read = nbytes + pages * (more[0] - nbytes), read + pages * (more[1] - read)
        result[n] = Held(nbytes, read)
    return result


def steady_after(spec: AnySpec, layers: Sequence[LayerShape]) -> int:
    """Return the number of tokens, in whole pages, after which every further page adds the same number of bytes."""
    windows = max((sliding for _, sliding in layers if sliding is not None), default=0)
    kept = max(
        own.sink + own.recent + (own.window or 0) + sum(limit for _, limit in own.codecs if limit is not None)
        for own in set(layer_specs(spec, len(layers)))
    )
    return -(-(kept + windows + LEARN + 2 * PAGE) // PAGE) * PAGE


def _replay(spec: Spec, layer: LayerShape, dtype: torch.dtype, batch: int, lengths: Sequence[int]) -> dict[int, Held]:
    """Compute what one layer holds after each of some numbers of tokens, ascending."""
    (heads, dim), sliding = layer
    used = tuple(_Outline(codecs.get(name), heads, dim) for name, _ in spec.codecs)
    group, done, found = SequenceGroup(RetentionPolicy.of(spec, used, sliding, memory=False), 0, list(range(batch))), 0, {}

    def read(group: SequenceGroup, tokens: int) -> SequenceGroup:
        x = torch.empty(batch, heads, tokens, dim, dtype=dtype, device="meta")
        group.end_step(group.begin_step(x, x, quantize_before_attend=False, asked=x))
        return group

    for n in lengths:
        while done + PAGE <= n:
            read(group, PAGE)
            done += PAGE
        found[n] = _count(read(_copied(group), n - done) if n > done else group)
    return found


def _copied(group: SequenceGroup) -> SequenceGroup:
    """Copy a group. The tensors may be shared, because they have no data that could be overwritten."""
    other = copy.copy(group)
    other.chain = group.chain.copied()
    return other


def _count(group: SequenceGroup) -> Held:
    chain = group.chain
    exact, held = [tier for tier in (chain.sink, chain.recent) if tier.buffers()], chain.buffers()
    packed = [tensor for name, tensors in held.items() if name not in ("sink", "recent") for tensor in tensors]
    nbytes = sum(map(_size, (tensor for tensors in held.values() for tensor in tensors)))
    read = sum(map(_size, (*packed, *(x for tier in exact for x in (tier.keys, tier.values)))))
    return Held(nbytes, read - sum(map(_passed_over, chain.quantized)))


def _passed_over(tier: QuantizedTier) -> int:
    """Return the bytes of a tier that a query does not read, because it reads selected blocks, and summaries of the others."""
    if tier.top is None or tier.tokens <= tier.top:
        return 0
    summaries = sum(_size(keys.tensors[name]) for keys, _ in tier.pages for name in ("centre", "scale"))
    return (sum(map(_size, tier.buffers())) - summaries) * (tier.tokens - tier.top) // tier.tokens


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Outline(Codec):
    """A codec that returns tensors of the shapes of another codec's, without encoding.

    Args:
        codec: the other.
        heads, dim: kv_heads and head_dim of what it is given.

    Raises:
        ValueError: if the sizes depend on more than the shape.
    """

    def __init__(self, codec: Codec, heads: int, dim: int) -> None:
        self.spec, self.group, self.weighs, self.fields = codec.spec, codec.group, codec.weighs, codec.fields
        self._sides: dict[Role, Codec] = {}
        self._kept = {}
        for role in ROLES:
            own = codec.side(role)
            self._sides[role] = self if own is codec else _Outline(own, heads, dim)
            self._kept[role] = own.kept(heads, dim, role)
            if any(own.fields[name] == "ragged" for name in self._kept[role]):
                raise ValueError(f"the bytes of {codec.spec!r} depend on the numbers that it is given; they cannot be foretold")

    def side(self, role: Role) -> Codec:
        """See `Codec`."""
        return self._sides[role]

    def encode(
        self, x: Tensor, role: Role = "value", layer: int = 0, *, weights: Tensor | None = None, tell: Any = None
    ) -> Packed:
        """See `Codec`; x is looked at for its shape only."""
        batch, heads, tokens, dim = x.shape
        side = self.side(role)
        tensors = {
            name: x.new_empty(
                (batch, heads, tokens if side.fields[name] == "token" else -(-tokens // side.group), *rest), dtype=kind
            )
            for name, (rest, kind) in self._kept[role].items()
        }
        return Packed(side, tensors, (batch, heads, tokens, dim), x.dtype, role, layer)

    def decode(self, packed: Packed) -> Tensor:
        """See `Codec`; the shape only."""
        return torch.empty(packed.shape, dtype=packed.dtype, device="meta")

    def _encode(self, x: Tensor, role: Role, layer: int) -> dict[str, Tensor]:
        raise NotImplementedError

    def decode_reference(self, packed: Packed) -> Tensor:
        """See `Codec`; there is nothing to decode."""
        raise NotImplementedError
