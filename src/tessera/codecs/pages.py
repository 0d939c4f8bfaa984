"""Pages: the bytes of a group of 64 tokens and a key head, at offsets that depend on the codec only.

A page holds the fields of the keys and then those of the values, each as `Codec.encode` leaves them for 64 tokens. An engine's
block holds a few pages behind each other, and behind them room for a request's first tokens, exactly. Attention over such
blocks is `tessera.kernels.paged`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tessera.codecs.base import Codec, Packed, Role
from tessera.codecs.channel_stats import KeyStats
from tessera.kernels.paged import GROUP, ROLES, BlockLayout, Field

#: Alignment of every field in bytes: the size of the largest kept number.
ALIGN = 4


def block_layout(
    codec: Codec,
    head_dim: int,
    dtype: torch.dtype,
    *,
    pages: int,
    sink: int = 0,
    heads: int = 1,
    layer: int = 0,
    stats: KeyStats | None = None,
) -> BlockLayout:
    """Compute the layout of one key head of a block.

    Args:
        codec: codec of keys and values, or a pair of codecs.
        head_dim: numbers of a key, and of a value.
        dtype: dtype of exact keys and values.
        pages: number of pages, of 64 tokens, in a block.
        sink: first tokens of a request that stay exact.
        heads: key heads of the layer, and
        layer: its index; some codecs depend on them.
        stats: statistics of the layer's keys, of one row; None: keys are coded as they come.

    Raises:
        ValueError: if a codec's bytes for 64 tokens are no fixed number, or no kernel reads them, saying so; or if the
            statistics are of other keys.
    """
    sides = {role: codec.side(role) for role in ROLES}
    kept = {role: side.kept(heads, head_dim, role) for role, side in sides.items()}
    forms = []
    for role, side in sides.items():
        form = side.kernel_format(head_dim)
        if form is None:
            raise ValueError(f"{side.spec!r} has no kernel that reads pages; hqmq:4 has one")
        if GROUP % side.group or any(side.fields[name] == "ragged" for name in kept[role]):
            raise ValueError(f"{side.spec!r} needs another number of bytes for every page; hqmq:4 needs the same for each")
        forms.append(form)
    if stats is not None:
        stats.check(heads, head_dim)
        if not codec.weighs:
            raise ValueError(f"statistics are for codecs that see keys as queries do, such as 'hqmq:4', not for {codec.spec!r}")
    if not 0 <= sink < GROUP:
        raise ValueError(f"of a request's first tokens 0 to {GROUP - 1} can stay exact, not {sink}")
    fields: dict[Role, dict[str, Field]] = {}
    offset = 0
    for role in ROLES:
        fields[role] = {}
        side = sides[role]
        for name, (rest, number) in kept[role].items():
            rows = GROUP if side.fields[name] == "token" else GROUP // side.group
            fields[role][name] = Field(offset, (rows, *rest), number)
            offset = _aligned(offset + rows * math.prod(rest) * number.itemsize)
    sink_offset = pages * offset
    used = sink_offset + 2 * sink * head_dim * dtype.itemsize
    # Engines count bytes per token, and fields of several bytes need a whole number of words.
    nbytes = -(-used // (pages * GROUP)) * pages * GROUP
    return BlockLayout(
        forms=(forms[0], forms[1]),
        layer=layer,
        decode=_Decoder(codec, head_dim, layer),
        head_dim=head_dim,
        pages=pages,
        page_bytes=offset,
        fields=fields,
        sink=sink,
        sink_offset=sink_offset,
        dtype=dtype,
        nbytes=nbytes,
        stats=stats,
    )


class _Decoder:
    """`BlockLayout.decode` for a codec."""

    def __init__(self, codec: Codec, head_dim: int, layer: int) -> None:
        self.codec, self.head_dim, self.layer = codec, head_dim, layer

    def __call__(self, role: Role, tensors: Mapping[str, Tensor]) -> Tensor:
        heads, pages = next(iter(tensors.values())).shape[:2]
        if not pages:
            return torch.zeros(heads, 0, self.head_dim, dtype=torch.float32, device=next(iter(tensors.values())).device)
        # A page's rows are tokens or groups; concatenated over pages they are the rows of `Packed`.
        flat = {name: x.flatten(1, 2).unsqueeze(0) for name, x in tensors.items()}
        shape = (1, heads, pages * GROUP, self.head_dim)
        side = self.codec.side(role)
        return side.decode(Packed(side, flat, shape, torch.float32, role, self.layer))[0]


def write(
    codec: Codec, layout: BlockLayout, pool: Tensor, blocks: Tensor, pages: Tensor, keys: Tensor, values: Tensor, first: Tensor
) -> None:
    """Encode groups into pages of a pool.

    The exact first tokens of a request are put beside the codes of its first page. Tokens that are read exactly are not coded:
    the codec gets the mean of the others in their place, so that an outlying first key does not distort the group's mean.

    Args:
        codec, layout: the codec and the layout of the pool.
        pool: (blocks, kv_heads, nbytes) uint8.
        blocks, pages: (n,) int64, the block of each group and its page there.
        keys, values: (n, kv_heads, 64, head_dim), the groups' tokens.
        first: (n,) bool, whether a group is its request's first.
    """
    if layout.sink and bool(first.any()):
        rows = first.nonzero().flatten()
        exact = torch.stack((keys[rows, :, : layout.sink], values[rows, :, : layout.sink]), dim=2)
        layout.sinks(pool)[blocks[rows]] = exact.to(layout.dtype)
        keys, values = keys.clone(), values.clone()
        for x in (keys, values):
            x[rows, :, : layout.sink] = x[rows, :, layout.sink :].mean(2, keepdim=True)
    views = layout.views(pool)
    stats = layout.stats
    assert stats is None or isinstance(stats, KeyStats)
    for role, x in zip(ROLES, (keys, values), strict=True):
        # Overflow in one request must not stop the engine that serves the others.
        coming, weights = x.float().nan_to_num(), None
        if stats is not None and role == "key":
            coming, weights = (coming * stats.widths.unsqueeze(2)).nan_to_num(), stats.weights
        # Encoded as one row of n · GROUP tokens, because all groups have the same weights.
        packed = codec.encode(coming.transpose(0, 1).flatten(1, 2)[None], role, layout.layer, weights=weights)
        for name, view in views[role].items():
            view[blocks, :, pages] = packed.tensors[name][0].unflatten(1, (len(x), -1)).transpose(0, 1)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGN) * ALIGN
