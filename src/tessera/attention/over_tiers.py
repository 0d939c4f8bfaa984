"""One softmax over all tiers of a `tessera.Cache`, and the contribution of its Tensor Cache."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from tessera.attention import select
from tessera.attention.missing_sinks import warn_if_sinks_are_missing
from tessera.attention.windowed import Softmax
from tessera.cache_layers.cache_layer import DeferredKV
from tessera.cache_layers.group import SequenceGroup, StepContext
from tessera.cache_layers.masks import GroupMask, Runs
from tessera.kernels import AttendParams, CompressedKV, dispatch
from tessera.kernels.source import Source
from tessera.tensor_cache.gated_read import MemoryCall, TensorCacheLayer
from tessera.tiers import KVSource, TensorCacheTier

#: `start` and `window` of a source that every query reads completely.
NO_RULE = (None, None)


def over_tiers(
    module: nn.Module, query: Tensor, deferred: DeferredKV, mask: Tensor | None, softmax: Softmax, call: MemoryCall | None
) -> Tensor:
    """Attention over all tiers of a cache's layer; arguments as in `attention_forward`.

    Returns (batch, tokens, heads, head_dim).
    """
    if softmax.dropout:
        raise ValueError("attention dropout and tessera.Cache do not go together; call model.eval()")
    scale = query.shape[-1] ** -0.5 if softmax.scaling is None else softmax.scaling
    layer = deferred.layer
    if mask is None and call is None and layer.context.sinks_known:
        group = layer.take_token(query)
        if group is not None:
            return _newest(query, group, scale, softmax).to(query.dtype).transpose(1, 2)
    memory = call.memory if call is not None and layer.policy.tensor_cache else None
    positions = None if memory is None or call is None else call.positions_of(query)
    steps = layer.begin_step(mask, positions, query)
    if not layer.context.sinks_known:
        warn_if_sinks_are_missing(layer, query, [step for step, _ in steps], scale, softmax)
    batch, heads, tokens, dim = query.shape
    out: Tensor | None = None
    added = None if memory is None else query.new_zeros((batch, tokens, memory.out.out_features))
    for step, seen in steps:
        index = step.index
        q = step.queries.of(query if index is None else query.index_select(0, index), 0, 2)
        if memory is not None and added is not None:
            _put(added, _recall(memory, q, step), index, step.queries)
        if not step.tokens:
            continue
        read = _attend(q, step, seen, scale, softmax).to(query.dtype).transpose(1, 2)
        if index is None and step.tokens == tokens:
            out = read.contiguous()
            break
        if out is None:
            out = query.new_zeros((batch, tokens, heads, dim))
        _put(out, read, index, step.queries)
    layer.end_step(steps)
    if call is not None:
        call.added = added
    return query.new_zeros((batch, tokens, heads, dim)) if out is None else out


def _newest(q: Tensor, group: SequenceGroup, scale: float, softmax: Softmax) -> Tensor:
    """Attention of the newest token of each row to all tokens. q, and the result: (rows, q_heads, 1, head_dim)."""
    found = group.chain.readable() if softmax.usual else None
    read = None if found is None else dispatch.attend_newest(q, *found, scale)
    if read is not None:
        return read
    return _attend(q, StepContext(group, group.length - 1, 1, group.chain.sources(), None), None, scale, softmax)


def _put(into: Tensor, given: Tensor, index: Tensor | None, queries: Runs) -> None:
    """Copy the results of some rows and queries into (batch, tokens, ...)."""
    at = 0
    for first, size in queries.runs:
        part, own = into[:, first : first + size], given[:, at : at + size].to(into.dtype)
        if index is None:
            part.copy_(own)
        else:
            part.index_copy_(0, index, own)
        at += size


def _recall(memory: TensorCacheLayer, q: Tensor, step: StepContext) -> Tensor:
    """Compute the Tensor Cache's contribution for a step's queries; the pairs that left then count as written.

    q: (rows, heads, tokens, head_dim); returns (rows, tokens, hidden).
    """
    group, window = step.group, memory.config.window
    matrix = group.chain.tensor_cache
    assert matrix is not None
    if matrix.window is None:
        return _read(memory, q, step, matrix)
    begin, end = matrix.written, step.first + step.tokens
    k, v = step.pairs(max(0, begin - window), max(0, end - window))
    group.policy.finite.look(k, v)
    # Pairs that left at earlier, then croppable queries have not been written yet; those queries read nothing now.
    late = step.first - begin
    at = matrix.positions_of(step.first, end, end)
    if at is not None:
        q = memory.unrotated(q, at)
    # Sinks, whose positions may be gone, are never written.
    at = matrix.positions_of(max(0, begin - window), max(0, end - window), end)
    if at is not None:
        k = memory.unrotated(k, at)
    live = (torch.arange(begin, end, device=q.device) - window >= memory.config.sink).expand(len(group.rows), -1)
    # No pair leaves until the window is full.
    idle = end - begin - k.shape[2]
    k, v = pad(k, (0, 0, idle, 0)), pad(v, (0, 0, idle, 0))
    before = matrix.state_for(memory.memory, k)
    read, after = memory.memory.advance(pad(q, (0, 0, late, 0)), k, v, live, before)
    keep = max(begin, end - step.hold)
    if keep < end:
        few = keep - begin
        unasked = q.new_zeros((*q.shape[:2], few, q.shape[3]))
        _, after = memory.memory.advance(unasked, k[:, :, :few], v[:, :, :few], live[:, :few], before)
    matrix.propose(after, keep)
    return memory.project(read[:, :, late:], q)


def _read(memory: TensorCacheLayer, q: Tensor, step: StepContext, matrix: TensorCacheTier) -> Tensor:
    """Compute the contribution of a memory behind codecs, which holds pairs of earlier calls; this call's leave at its end."""
    group, end = step.group, step.first + step.tokens
    at = matrix.positions_of(step.first, end, end)
    if at is not None:
        q = memory.unrotated(q, at)

    def absorb(k: Tensor, v: Tensor, place: int) -> None:
        group.policy.finite.look(k, v)
        at = matrix.positions_of(place, place + k.shape[2], end)
        k = k if at is None else memory.unrotated(k, at)
        real = torch.ones((len(group.rows), k.shape[2]), dtype=torch.bool, device=k.device)
        none = q.new_zeros((*q.shape[:2], k.shape[2], q.shape[3]))
        matrix.state = memory.memory.advance(none, k, v, real, matrix.state_for(memory.memory, k))[1].detach()

    matrix.absorb = absorb
    heads, dim = memory.memory.num_heads, memory.memory.head_dim
    nothing = q.new_zeros((q.shape[0], heads, q.shape[2], dim))
    idle = torch.zeros((q.shape[0], q.shape[2]), dtype=torch.bool, device=q.device)
    read, _ = memory.memory.advance(q, nothing, nothing, idle, matrix.state_for(memory.memory, nothing))
    return memory.project(read, q)


def _attend(q: Tensor, step: StepContext, mask: GroupMask | None, scale: float, softmax: Softmax) -> Tensor:
    """Compute one softmax over all sources. q, and the result: (rows, q_heads, tokens, head_dim)."""
    if mask is None and softmax.s_aux is None and not any(_sparse(source) for source in step.sources):
        given = [Source(source.held, *(NO_RULE if source.unmasked else _rule(step, source))) for source in step.sources]
        read = dispatch.attend_sources(q, given, scale, softmax.softcap)
        if read is None and len(given) == 1 and softmax.usual:
            read = _fused(q, step, scale)
        if read is not None:
            return read
    results = []
    for source in step.sources:
        start, window = _rule(step, source)
        seen = None
        if mask is not None:
            # The mask may differ from causality, so a window only hides what is older than it.
            seen = mask.columns(source.start, source.tokens)
            if window is not None and not step.group.policy.masked:
                seen = seen & _newer(step, source, window, q.device)
            start = window = None
        if source.unmasked:
            seen = start = window = None
        params = AttendParams(scale, seen, softmax.softcap, start, window)
        if isinstance(source.held, CompressedKV):
            results.append(_over_pages(q, source, source.held, params))
        else:
            results.append(dispatch.attend_exact(q, *source.held, params))
    if softmax.s_aux is not None:
        lse = softmax.s_aux.float().view(1, -1, 1).expand(q.shape[:3])
        results.append((torch.zeros_like(results[0][0]), lse))
    return dispatch.merge(results)[0]


def _sparse(source: KVSource) -> bool:
    """Whether queries read only selected blocks of the source."""
    return source.top is not None and source.top < source.tokens


def _over_pages(q: Tensor, source: KVSource, pages: CompressedKV, params: AttendParams) -> tuple[Tensor, Tensor]:
    """Partial attention to quantised tokens, on the device that holds them; arguments as in `dispatch.attend`."""
    here, there = q.device, pages.pages[0][0].device
    if here != there:
        q, params = q.to(there), replace(params, mask=None if params.mask is None else params.mask.to(there))
    if _sparse(source):
        out, lse = _sparsely(q, source, params)
    else:
        out, lse = dispatch.attend(q, pages, params)
    return out.to(here), lse.to(here)


def _sparsely(q: Tensor, source: KVSource, params: AttendParams) -> tuple[Tensor, Tensor]:
    """Partial attention to the selected blocks of a source; arguments as in `dispatch.attend`."""
    assert isinstance(source.held, CompressedKV)
    parts = []
    for part, own in select.in_parts(q, source, params):
        parts.append(dispatch.attend(q[:, :, part], source.held, own))
    out, lse = zip(*parts, strict=True)
    return torch.cat(out, 2), torch.cat(lse, 2)


def _newer(step: StepContext, source: KVSource, window: int, device: torch.device) -> Tensor:
    """Whether a key of the part is within a query's window or newer than the query: (queries, tokens) bool."""
    query = torch.arange(step.first, step.first + step.tokens, device=device)[:, None]
    return torch.arange(source.start, source.start + source.tokens, device=device) > query - window


def _rule(step: StepContext, source: KVSource) -> tuple[int | None, int | None]:
    """Return the part's `start` and `window` for the kernels, None where they hide nothing."""
    start, window = step.first - source.start, source.window
    if window is not None and start + step.tokens - window <= 0:
        window = None
    if window is None and start >= source.tokens - 1:
        return None, None
    return start, window


def _fused(q: Tensor, step: StepContext, scale: float) -> Tensor | None:
    """Use PyTorch's attention where a single exact part with a causal rule is read.

    Kernels go first, except for many queries in bfloat16, for which processors may have matrix products.
    """
    source = step.sources[0]
    if isinstance(source.held, CompressedKV) or source.held[0].dtype != q.dtype:
        return None
    k, v = source.held
    if v.dtype != q.dtype and not torch.is_autocast_enabled(q.device.type):
        return None
    start, window = _rule(step, source)
    if window is not None:
        return None
    rows, heads, tokens, dim = q.shape
    if (q.dtype != torch.bfloat16 or tokens == 1) and dispatch.exact_family(q, k, v, AttendParams(scale, start=start)) == "cpu":
        return None
    if start is None and tokens == 1:
        # The query heads of a group are folded into the query tokens of their key head, so keys are not repeated.
        packed = q.reshape(rows, k.shape[1], heads // k.shape[1], dim)
        return scaled_dot_product_attention(packed, k, v, scale=scale).reshape(rows, heads, 1, dim)
    if start == 0 and tokens == source.tokens:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=heads != k.shape[1])
    return None
