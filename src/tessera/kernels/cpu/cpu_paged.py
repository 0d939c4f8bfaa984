"""Attention by block table in C++, see `tessera.kernels.paged`."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tessera.kernels import cpu
from tessera.kernels.paged import GROUP, ROLES, BlockLayout, PagedCall, Step

#: Dtypes of exact keys and values, with their numbers in the kernels.
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal(q: Tensor, layout: BlockLayout) -> str | None:
    """Say why the kernels cannot be used, or return None if they can."""
    dim = layout.head_dim
    if cpu.MISSING is not None:
        return cpu.MISSING
    if q.device.type != "cpu":
        return f"the queries are on {q.device}"
    if layout.dtype not in TYPES or q.dtype != layout.dtype:
        return f"there is no kernel for queries in {q.dtype} over exact keys in {layout.dtype}"
    if dim % 4 or dim > cpu.MAX_DIM:
        return f"head_dim {dim} is no multiple of 4 up to {cpu.MAX_DIM}"
    return None


def attend_paged(call: PagedCall, *, out: Tensor, level: str | None = None, limbs: int = cpu.LIMBS) -> None:
    """`tessera.kernels.paged.attend_paged`, and then `fill_rings`.

    Args:
        call: its queries, keys and values in the layout's dtype.
        out: (tokens, q_heads, head_dim) in the layout's dtype, takes the result.
        level, limbs: see `tessera.kernels.cpu.attend`.

    Raises:
        ValueError: if a table names no block of the pool, or lengths do not fit.
    """
    heads, layout = call.pool.shape[1], call.layout
    key_form, value_form = layout.forms
    q, k, v = _packed(call.q), _packed(call.k), _packed(call.v)
    if out.stride(2) != 1:
        raise ValueError("a result's numbers must lie next to each other")
    cpu._cpu.attend_paged(
        cpu.book(key_form, heads, layout.layer),
        cpu.book(value_form, heads, layout.layer),
        _pool(call.pool, call.ring, layout),
        level or cpu.levels()[-1],
        _requests(call.step),
        [*_rows(k), *_rows(v)],
        [*_rows(q), *_rows(out)],
        q.shape[1],
        call.scale,
        value_form.value_gain,
        call.softcap or 0.0,
        call.window or 0,
        0 if call.drains is None else call.drains.data_ptr(),
        limbs,
        torch.get_num_threads(),
    )


def collect(k: Tensor, v: Tensor, pool: Tensor, ring: Tensor, layout: BlockLayout, step: Step) -> tuple[Tensor, Tensor]:
    """`tessera.kernels.paged.collect` in C++."""
    groups = step.whole_groups()
    k, v = _packed(k), _packed(v)
    shape = (groups.shape[1], pool.shape[1], GROUP, layout.head_dim)
    keys, values = torch.empty(shape, dtype=torch.float32), torch.empty(shape, dtype=torch.float32)
    cpu._cpu.collect(
        _pool(pool, ring, layout),
        _requests(step),
        [*_rows(k), *_rows(v)],
        groups.data_ptr(),
        groups.shape[1],
        keys.data_ptr(),
        values.data_ptr(),
        torch.get_num_threads(),
    )
    return keys, values


def _packed(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _rows(x: Tensor) -> tuple[int, int, int]:
    """Address and strides in bytes over tokens and heads."""
    size = x.element_size()
    return x.data_ptr(), x.stride(0) * size, x.stride(1) * size


def _requests(step: Step) -> list[int]:
    """Return a step in the form that the kernels read; its tables are contiguous int32."""
    if "cpu" not in step.memo:
        tables = [x.to("cpu", torch.int32).contiguous() for x in (step.first, step.lengths, step.table, step.rings)]
        first, lengths, table, rings = tables
        row = [
            len(lengths),
            first.data_ptr(),
            lengths.data_ptr(),
            table.data_ptr(),
            table.shape[1],
            rings.data_ptr(),
            rings.shape[1],
        ]
        step.memo["cpu"] = row, tables
    return step.memo["cpu"][0]


_POOLS: WeakKeyDictionary[BlockLayout, tuple[tuple[int, ...], Any, Tensor | None]] = WeakKeyDictionary()


def _pool(pool: Tensor, ring: Tensor, layout: BlockLayout) -> Any:
    """Return what is the same in all steps of a layer; each layer has its own layout."""
    key = (pool.data_ptr(), ring.data_ptr(), *pool.shape, *pool.stride(), *ring.shape, *ring.stride())
    kept = _POOLS.get(layout)
    if kept is None or kept[0] != key:
        offsets = [
            layout.fields[role][form.fields[role][what]].offset if form.fields[role].get(what) in layout.fields[role] else -1
            for what in ("codes", "scale", "centre", "low")
            for role, form in zip(ROLES, layout.forms, strict=True)
        ]
        sink = layout.sink_offset
        narrowing = None if layout.stats is None else layout.stats.narrowing[0].to("cpu").contiguous()
        made = cpu._cpu.Pool(
            [
                pool.data_ptr(),
                pool.shape[0],
                *pool.stride()[:2],
                layout.page_bytes,
                layout.pages,
                *offsets,
                sink,
                sink + layout.sink * layout.head_dim * layout.dtype.itemsize,
                layout.sink,
            ],
            [ring.data_ptr(), ring.shape[0], *ring.stride()[:3], layout.ring_bytes // 2, ring.shape[2]],
            [pool.shape[1], layout.head_dim, TYPES.index(layout.dtype)],
            0 if narrowing is None else narrowing.data_ptr(),
        )
        kept = _POOLS[layout] = (key, made, narrowing)
    return kept[1]
