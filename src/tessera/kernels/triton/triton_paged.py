"""Attention of an engine's step over packed pages on a GPU, see `tessera.kernels.paged`.

The packed groups of a request are read in place by the kernel of `attend_blocks`, through a table that is made on the device
from the engine's table of blocks. Attention to exact tokens, those of a query's own group and the sinks, runs in PyTorch, and
all parts are merged by their log-sum-exp. There is one launch for each request.
"""

from __future__ import annotations

import math
from math import gcd

import torch
from torch import Tensor

from tessera.kernels import triton
from tessera.kernels.paged import GROUP, ROLES, BlockLayout, PagedCall, finish
from tessera.kernels.params import AttendParams
from tessera.kernels.triton.block_table import COLUMNS, FIELDS, block_of, shares_tokens
from tessera.kernels.triton.formats import dim_refusal, readable


def refusal(q: Tensor, layout: BlockLayout) -> str | None:
    """Say why the kernels cannot be used, or return None if they can."""
    if triton.missing() is not None:
        return triton.missing()
    if not triton.interpreted() and not q.is_cuda:
        return f"the queries are on {q.device}"
    if not all(readable(form) for form in layout.forms):
        return "there is no Triton kernel for its codec"
    return dim_refusal(layout.forms, layout.head_dim)


def attend_paged(call: PagedCall) -> Tensor:
    """Compute `tessera.kernels.paged.attend_paged` in Triton and PyTorch."""
    out = torch.zeros(call.q.shape, dtype=torch.float32, device=call.q.device)
    for r, (token, start, end) in enumerate(call.step.spans()):
        if start == end:
            continue
        rows = slice(token, token + end - start)
        queries = call.q[rows].transpose(0, 1)[None]  # (1, heads, n, d)
        parts = [_own(call, queries, call.k[rows], call.v[rows], r)]
        groups = (end - 1) // GROUP
        if groups:
            parts.append(_packed(call, queries, call.step.table[r], groups, start))
        if call.drains is not None:
            lse = call.drains.float()[None, :, None].expand(queries.shape[:3]).contiguous()
            parts.append((torch.zeros_like(parts[0][0]), lse))
        found = triton.merge(parts)[0] if len(parts) > 1 else parts[0][0]
        out[rows] = found[0].transpose(0, 1)
    return out


def attend_step(call: PagedCall, *, out: Tensor) -> None:
    """Compute `tessera.kernels.paged.attend_step`."""
    finish(attend_paged(call), call, out)


def _packed(call: PagedCall, queries: Tensor, table: Tensor, groups: int, start: int) -> tuple[Tensor, Tensor]:
    """Compute attention to the first groups of a request, without the sinks: each query sees those before its own."""
    pool, layout = call.pool, call.layout
    keys, values = layout.forms
    assert readable(keys)
    assert readable(values)
    n = queries.shape[2]
    if layout.stats is not None:
        grouped = queries.float().unflatten(1, (pool.shape[1], -1))
        queries = (grouped * layout.stats.narrowing.to(queries.device)[:, :, None, None]).flatten(1, 2)
    blocks, aligns, _kept = group_table(pool, layout, table, groups)
    mask = None
    if (start + n - 1) // GROUP > start // GROUP or groups > start // GROUP:
        own = torch.arange(start, start + n, device=queries.device) // GROUP
        mask = (torch.arange(groups * GROUP, device=queries.device) // GROUP < own[:, None])[None, None]
    return triton.attend_blocks(
        queries,
        blocks,
        (keys, values),
        AttendParams(call.scale, mask, call.softcap, start, call.window),
        kv_heads=pool.shape[1],
        aligns=aligns,
        centred="centre" in layout.fields["key"],
    )


def group_table(pool: Tensor, layout: BlockLayout, table: Tensor, groups: int) -> tuple[Tensor, tuple[int, int], Tensor | None]:
    """Make the table of `tessera.kernels.triton.block_table` for the first groups of a request, without its sinks.

    Args:
        pool, layout: see `tessera.kernels.paged.PagedCall`.
        table: (any,) int32, the request's blocks.
        groups: number of groups.

    Returns:
        The table on the pool's device; divisors of the addresses of key codes and centres, and of those of value codes; and the
        tensors that the table points to besides the pool.
    """
    device = pool.device
    size, _ = block_of(layout.forms[0])
    count = GROUP // size  # kernel's blocks of a group
    number = torch.arange(groups * count, device=device)
    group, part = number // count, number % count
    block, page = table.to(device)[group // layout.pages].long(), group % layout.pages
    base = pool.data_ptr() + block * pool.stride(0) + page * layout.page_bytes
    skipped = torch.where(group == 0, (layout.sink - part * size).clamp(0, size), 0)
    rows = torch.zeros(len(number), COLUMNS, dtype=torch.int64, device=device)
    kept: Tensor | None = None
    shared = [16, pool.data_ptr(), pool.stride(0), pool.stride(1), layout.page_bytes]
    divisors = {"key": list(shared), "value": list(shared)}
    forms = dict(zip(ROLES, layout.forms, strict=True))
    for column, (role, names) in enumerate(FIELDS):
        if names == ("exponent",):
            if "centre" in layout.fields["key"]:
                # The kernel needs the largest exponent among a group's channels; pages hold that of each channel.
                centre = layout.views(pool)["key"]["centre"][block, :, page]  # (groups, kv_heads, 1, d)
                kept = (centre & 15).amax((-1, -2)).to(torch.uint8)
                rows[:, column] = kept.data_ptr() + number * kept.shape[1]
                rows[:, 7 + column] = 1
            continue
        known = forms[role].fields[role]
        field = next((layout.fields[role][known[name]] for name in names if known.get(name) in layout.fields[role]), None)
        if field is None:
            continue
        row_bytes = math.prod(field.shape[1:]) * field.dtype.itemsize
        grouped = role == "key" and (names[0] == "centre" or (names[0] == "scale" and shares_tokens(forms[role])))
        rows[:, column] = base + field.offset + (part if grouped else part * size + skipped) * row_bytes
        rows[:, 7 + column] = pool.stride(1)
        if names[0] in ("codes", "centre"):
            divisors[role] += [field.offset, row_bytes] if grouped else [field.offset, layout.sink * row_bytes, row_bytes]
    rows[:, 14] = size - skipped
    rows[:, 15] = group * GROUP + part * size + skipped
    return rows, (gcd(*divisors["key"]), gcd(*divisors["value"])), kept


def _own(call: PagedCall, queries: Tensor, k: Tensor, v: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Compute attention to a token's own group and to the sinks: (1, heads, n, d) and its log-sum-exp, float32.

    Groups are a batch dimension: (groups, heads, GROUP, sinks + GROUP) scores, whatever the length of the step.
    """
    pool, ring, layout, step = call.pool, call.ring, call.layout, call.step
    _, start, end = step.spans()[r]
    first, last = start // GROUP, (end - 1) // GROUP
    base, count = first * GROUP, last - first + 1
    _, heads, n, dim = queries.shape
    kv_heads = k.shape[1]
    device = queries.device
    slots = torch.arange(base, start, device=device) % ring.shape[2]
    # Indexing with a tensor of one element does not synchronise, as one without dimensions would.
    before = layout.ring(ring)[step.rings[r, :1].long()][0, :, slots].float().transpose(0, 1)  # (start - base, kv_heads, 2, d)
    fresh = torch.stack((k, v), dim=2).float()
    own = torch.nn.functional.pad(torch.cat((before, fresh)), (0, 0, 0, 0, 0, 0, 0, count * GROUP - (end - base)))
    own = own.view(count, GROUP, kv_heads, 2, dim).permute(3, 0, 2, 1, 4)  # (2, groups, kv_heads, GROUP, d)
    sinks = layout.sinks(pool)[step.table[r, :1].long()][0].float().transpose(0, 1)  # (2, kv_heads, sinks, d)
    keys, values = torch.cat((sinks[:, None].expand(-1, count, -1, -1, -1), own), dim=3)
    rows = torch.nn.functional.pad(queries[0].float(), (0, 0, start - base, count * GROUP - (end - base)))
    rows = rows.view(kv_heads, heads // kv_heads, count, GROUP, dim).permute(2, 0, 1, 3, 4)
    scores = torch.einsum("gkhid,gkjd->gkhij", rows, keys) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    at = torch.arange(first * GROUP, (last + 1) * GROUP, device=device).view(count, GROUP)
    place = torch.cat((torch.arange(layout.sink, device=device).expand(count, -1), at), dim=1)[:, None]
    seen = place <= at[..., None]
    # In a request's first group the sinks are among its own tokens.
    seen[:, :, : layout.sink] &= (torch.arange(first, last + 1, device=device) > 0)[:, None, None]
    if call.window is not None:
        seen &= place > at[..., None] - call.window
    scores = scores.masked_fill(~seen[:, None, None], -math.inf)
    lse = scores.logsumexp(-1)
    found = torch.einsum("gkhij,gkjd->gkhid", (scores - lse[..., None]).exp(), values)
    inside = slice(start - base, start - base + n)
    out = found.permute(1, 2, 0, 3, 4).reshape(heads, count * GROUP, dim)[:, inside]
    return out[None].contiguous(), lse.permute(1, 2, 0, 3).reshape(heads, count * GROUP)[None, :, inside].contiguous()
