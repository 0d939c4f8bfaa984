"""The definition, in plain PyTorch, of attention in an engine's step over packed pages in blocks.

An engine cuts the memory for keys and values into blocks and gives each request a table of them. Here a block holds, for each
key head, a few pages of `GROUP` tokens in the bytes of a codec. The codec encodes the tokens of a group together, so the group
that a request is filling is kept exactly, in a ring of its own, and becomes a page when it is whole.

A query sees the whole groups before its own as the codec gives them back, the request's first tokens (`BlockLayout.sink`)
exactly, and its own group exactly. So what is computed for a token depends on its position alone: not on how a prompt is cut
into steps, nor on which blocks were there already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from tessera.kernels.compressed_kv import Format, Widened

#: Tokens of a page.
GROUP = 64
Role: TypeAlias = Literal["key", "value"]
ROLES: tuple[Role, Role] = ("key", "value")


@dataclass(frozen=True)
class Field:
    """The offset, shape and dtype of a kept tensor within a page.

    Attributes:
        offset: bytes from the beginning of the page.
        shape: shape of one page's tensor.
        dtype: dtype of its numbers.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """The layout of one key head in one block: `pages` contiguous pages, then the sinks; made by `codecs.pages`.

    Attributes:
        forms: the formats of keys and of values.
        layer: index of the layer in its model; codebooks drawn per layer depend on it.
        decode: (role, fields of pages (kv_heads, pages, *shape)) -> (kv_heads, pages · GROUP, head_dim) float32.
        head_dim: numbers of a key, and of a value.
        pages: in a block, of `GROUP` tokens each.
        page_bytes: bytes of a page, keys and values together.
        fields: fields of a page, by role ("key", "value") and by the codec's name for it.
        sink: first tokens of a request that are kept exactly, in its first block.
        sink_offset: bytes from the beginning of the block to the sinks' keys; their values follow.
        dtype: dtype of exact keys and values.
        nbytes: bytes of the whole, a multiple of the block's tokens.
        stats: the factors of key channels before encoding, of one row; None: there are none. Exact keys are unchanged.
    """

    forms: tuple[Format, Format]
    layer: int
    decode: Callable[[Role, Mapping[str, Tensor]], Tensor]
    head_dim: int
    pages: int
    page_bytes: int
    fields: Mapping[Role, Mapping[str, Field]]
    sink: int
    sink_offset: int
    dtype: torch.dtype
    nbytes: int
    stats: Widened | None = None

    @property
    def tokens(self) -> int:
        """Tokens of a block."""
        return self.pages * GROUP

    @property
    def token_bytes(self) -> int:
        """Bytes per token and key head of a block, as engines count them."""
        return self.nbytes // self.tokens

    @property
    def ring_bytes(self) -> int:
        """Bytes of a ring's token and key head: an exact key, then an exact value."""
        return 2 * self.head_dim * self.dtype.itemsize

    def views(self, pool: Tensor) -> dict[Role, dict[str, Tensor]]:
        """The fields of all pages of a pool, without copying.

        Args:
            pool: (blocks, kv_heads, nbytes) uint8; the bytes of a head in a block lie next to each other.

        Returns:
            By role and name: (blocks, kv_heads, pages, *shape).
        """
        return {role: {name: self._view(pool, field) for name, field in self.fields[role].items()} for role in ROLES}

    def _view(self, pool: Tensor, field: Field) -> Tensor:
        size = field.dtype.itemsize
        wide = pool.view(field.dtype)
        inner = [math.prod(field.shape[i + 1 :]) for i in range(len(field.shape))]
        return wide.as_strided(
            (*pool.shape[:2], self.pages, *field.shape),
            (*wide.stride()[:2], self.page_bytes // size, *inner),
            wide.storage_offset() + field.offset // size,
        )

    def sinks(self, pool: Tensor) -> Tensor:
        """The exact first tokens: (blocks, kv_heads, 2, sink, head_dim) in `dtype`, keys and then values, without copying."""
        wide = pool.view(self.dtype)
        return wide.as_strided(
            (*pool.shape[:2], 2, self.sink, self.head_dim),
            (*wide.stride()[:2], self.sink * self.head_dim, self.head_dim, 1),
            wide.storage_offset() + self.sink_offset // self.dtype.itemsize,
        )

    def ring(self, ring: Tensor) -> Tensor:
        """Rings (blocks, kv_heads, tokens, ring_bytes) uint8 as (blocks, kv_heads, tokens, 2, head_dim) in `dtype`."""
        return ring.view(self.dtype).unflatten(-1, (2, self.head_dim))


@dataclass(frozen=True, eq=False)
class Step:
    """The tokens of an engine's step, and the blocks of each request's earlier tokens.

    Attributes:
        first: (requests + 1,) int32 on the CPU; tokens [first[r], first[r + 1]) of the step belong to request r.
        lengths: (requests,) int32 on the CPU: tokens of each request, those of the step included, which are its last.
        table: (requests, any) int32, the blocks of each request.
        rings: (requests, at least 1) int32, its first column the block that is each request's ring.
        memo: data that backends derive from this and keep as long as it exists.
    """

    first: Tensor
    lengths: Tensor
    table: Tensor
    rings: Tensor
    memo: dict[Any, Any]

    def spans(self) -> list[tuple[int, int, int]]:
        """Return for each request the index of its first token in the step, and the positions [start, end) of its tokens."""
        first, lengths = self.first.tolist(), self.lengths.tolist()
        return [(first[r], end - (first[r + 1] - first[r]), end) for r, end in enumerate(lengths)]

    def whole_groups(self) -> Tensor:
        """Return the groups that the step completes: (2, n) int32 on the CPU, the request of each and its number within it."""
        if "groups" not in self.memo:
            found = [
                (r, group) for r, (_, start, end) in enumerate(self.spans()) for group in range(start // GROUP, end // GROUP)
            ]
            self.memo["groups"] = torch.tensor(found, dtype=torch.int32, device="cpu").view(-1, 2).T.contiguous()
        return self.memo["groups"]


class PagedCall(NamedTuple):
    """The arguments of attention in a step.

    Attributes:
        q: (tokens, q_heads, head_dim), the requests' tokens concatenated.
        k, v: (tokens, kv_heads, head_dim), of the same tokens.
        pool: (blocks, kv_heads, nbytes) uint8.
        ring: (blocks, kv_heads, ring tokens, ring_bytes) uint8; token t of a request lies at t modulo the ring's tokens.
        layout: layout of a block.
        step: whose tokens these are.
        scale: multiplies the scores.
        softcap: scores become softcap · tanh(score / softcap); None: they stay.
        window: a query sees this many newest tokens, itself included; None: all.
        drains: (q_heads,) attention-sink logits, which take part in the softmax and have no value, as in gpt-oss; None: there
            are none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    pool: Tensor
    ring: Tensor
    layout: BlockLayout
    step: Step
    scale: float
    softcap: float | None = None
    window: int | None = None
    drains: Tensor | None = None


def attend_paged(call: PagedCall) -> Tensor:
    """Attention of all tokens of a step. Groups that the step completes must be in the pool already (`codecs.pages.write`).

    Returns:
        (tokens, q_heads, head_dim) float32.
    """
    q, pool, layout, step = call.q, call.pool, call.layout, call.step
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    for r, (token, start, end) in enumerate(step.spans()):
        keys, values = _packed(pool, layout, step.table[r], end // GROUP)
        own_k, own_v = _exact(call, r)
        sinks = layout.sinks(pool)[int(step.table[r, 0])].float() if layout.sink else None
        for group in range(start // GROUP, -(-end // GROUP)):
            low, high = group * GROUP, min(end, (group + 1) * GROUP)
            a, b = max(start, low), high
            past_k, past_v = keys[:, :low].clone(), values[:, :low].clone()
            if sinks is not None and group:
                past_k[:, : layout.sink], past_v[:, : layout.sink] = sinks[:, 0], sinks[:, 1]
            base = start // GROUP * GROUP
            all_k = torch.cat((past_k, own_k[:, low - base : high - base]), dim=1)
            all_v = torch.cat((past_v, own_v[:, low - base : high - base]), dim=1)
            rows = slice(token + a - start, token + b - start)
            out[rows] = _softmax(call, q[rows], all_k, all_v, a)
    return out


def _packed(pool: Tensor, layout: BlockLayout, table: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Decode the first groups of a request: keys and values, (kv_heads, tokens, head_dim) float32 each."""
    views = layout.views(pool)
    blocks = table[: -(-groups // layout.pages)].long()
    found = []
    for role in ROLES:
        # (blocks, heads, pages, *shape) -> (heads, blocks · pages, *shape)
        tensors = {name: x[blocks].transpose(0, 1).flatten(1, 2)[:, :groups] for name, x in views[role].items()}
        found.append(layout.decode(role, tensors))
    if layout.stats is not None:
        found[0] = found[0] * layout.stats.narrowing[0].to(pool.device)[:, None]
    return found[0], found[1]


def _exact(call: PagedCall, r: int) -> tuple[Tensor, Tensor]:
    """Return a request's exact tokens from the group in which its step begins: (kv_heads, n, head_dim) float32 each."""
    token, start, end = call.step.spans()[r]
    base = start // GROUP * GROUP
    mine = call.layout.ring(call.ring)[int(call.step.rings[r, 0])]
    slots = torch.arange(base, start, device=call.ring.device) % call.ring.shape[2]
    kept = mine[:, slots].float()
    new = slice(token, token + end - start)
    return (
        torch.cat((kept[:, :, 0], call.k[new].float().transpose(0, 1)), dim=1),
        torch.cat((kept[:, :, 1], call.v[new].float().transpose(0, 1)), dim=1),
    )


def _softmax(call: PagedCall, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    """Causal attention of queries (n, q_heads, d), the first at `start`, over keys (kv_heads, positions from 0 on, d)."""
    n, heads, _ = q.shape
    shared = heads // k.shape[0]
    k, v = k.repeat_interleave(shared, 0), v.repeat_interleave(shared, 0)
    scores = q.float().transpose(0, 1) @ k.transpose(1, 2) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    query = torch.arange(start, start + n, device=q.device)[:, None]
    key = torch.arange(k.shape[1], device=q.device)
    seen = key <= query
    if call.window is not None:
        seen &= key > query - call.window
    scores = scores.masked_fill(~seen, -math.inf)
    if call.drains is not None:
        scores = torch.cat((scores, call.drains.float().view(-1, 1, 1).expand(-1, n, 1)), dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[1]]
    return (weights @ v).transpose(0, 1)


def collect(k: Tensor, v: Tensor, ring: Tensor, layout: BlockLayout, step: Step) -> tuple[Tensor, Tensor]:
    """Collect exact keys and values of the groups that a step completes: (n, kv_heads, GROUP, head_dim) float32 each."""
    requests, numbers = step.whole_groups().to(k.device).long()
    first, lengths = step.first.to(k.device).long(), step.lengths.to(k.device).long()
    start = (lengths - (first[1:] - first[:-1]))[requests, None]
    place = numbers[:, None] * GROUP + torch.arange(GROUP, device=k.device)
    new = place >= start  # the others are in the ring
    token = torch.where(new, first[requests, None] + place - start, 0)
    rings = step.rings[:, 0].to(k.device).long()[requests, None]
    old = layout.ring(ring)[rings, :, place % ring.shape[2]].float()
    found = [torch.where(new[..., None, None], x[token].float(), old[:, :, :, i]).transpose(1, 2) for i, x in enumerate((k, v))]
    return found[0].contiguous(), found[1].contiguous()


def collect_from(k: Tensor, v: Tensor, pool: Tensor, ring: Tensor, layout: BlockLayout, step: Step) -> tuple[Tensor, Tensor]:
    """Do what `collect` does; kernels check the tables against the pool."""
    return collect(k, v, ring, layout, step)


def fill_rings(k: Tensor, v: Tensor, ring: Tensor, layout: BlockLayout, step: Step) -> None:
    """Write the newest tokens of the step into each request's ring."""
    size = ring.shape[2]
    index = [
        (int(step.rings[r, 0]), at % size, token + at - start)
        for r, (token, start, end) in enumerate(step.spans())
        for at in range(max(start, end - size), end)
    ]
    block, slot, token = torch.tensor(index, dtype=torch.long, device=k.device).view(-1, 3).T
    layout.ring(ring)[block, :, slot] = torch.stack((k[token], v[token]), dim=2).to(layout.dtype)


def finish(found: Tensor, call: PagedCall, out: Tensor) -> None:
    """Write the result of `attend_paged` into `out`, (tokens, q_heads, head_dim), and then call `fill_rings`."""
    out.copy_(found)
    fill_rings(call.k, call.v, call.ring, call.layout, call.step)


def attend_step(call: PagedCall, *, out: Tensor) -> None:
    """Call `attend_paged` and then `finish`."""
    finish(attend_paged(call), call, out)
