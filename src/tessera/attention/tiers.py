"""One softmax over all tiers of a `tessera.Cache`, and what its associative memory adds."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from tessera.associative.layer import MemoryCall, TensorCacheLayer
from tessera.attention.missing_sinks import warn_if_sinks_are_missing
from tessera.attention.plain import Softmax
from tessera.cache.lane import Part, Turn
from tessera.cache.layer import Handle
from tessera.cache.masks import GroupMask, Runs
from tessera.kernels import AttendParams, Pages, dispatch


def over_tiers(
    module: nn.Module, query: Tensor, handle: Handle, mask: Tensor | None, softmax: Softmax, call: MemoryCall | None
) -> Tensor:
    """Attention to all that a layer of a cache holds; arguments as of `attention_forward`.

    Returns (batch, tokens, heads, head_dim).
    """
    if softmax.dropout:
        raise ValueError("attention dropout and tessera.Cache do not go together; call model.eval()")
    scale = query.shape[-1] ** -0.5 if softmax.scaling is None else softmax.scaling
    layer = handle.layer
    memory = call.memory if call is not None and layer.policy.associative else None
    positions = None if memory is None or call is None else call.positions_of(query)
    turns = layer.open(mask, positions, query)
    if not layer.link.sinks_known:
        warn_if_sinks_are_missing(layer, query, [turn for turn, _ in turns], scale, softmax)
    batch, heads, tokens, dim = query.shape
    out: Tensor | None = None
    added = None if memory is None else query.new_zeros((batch, tokens, memory.out.out_features))
    for turn, seen in turns:
        rows = turn.lane.rows
        whole = len(rows) == batch
        index = None if whole else torch.tensor(rows, device=query.device)
        q = turn.queries.of(query if index is None else query.index_select(0, index), 0, 2)
        if memory is not None and added is not None:
            _put(added, _recall(memory, q, turn), rows, turn.queries)
        if not turn.tokens:
            continue
        part = _attend(q, turn, seen, scale, softmax).to(query.dtype).transpose(1, 2)
        if whole and turn.tokens == tokens:
            out = part.contiguous()
            break
        if out is None:
            out = query.new_zeros((batch, tokens, heads, dim))
        _put(out, part, rows, turn.queries)
    layer.close(turns)
    if call is not None:
        call.added = added
    return query.new_zeros((batch, tokens, heads, dim)) if out is None else out


def _put(into: Tensor, part: Tensor, rows: list[int], queries: Runs) -> None:
    """Write what some rows and queries have got into (batch, tokens, ...)."""
    at = 0
    for first, size in queries.runs:
        into[rows, first : first + size] = part[:, at : at + size].to(into.dtype)
        at += size


def _recall(memory: TensorCacheLayer, q: Tensor, turn: Turn) -> Tensor:
    """What the associative memory adds for the queries of a turn, whose lane then knows the pairs that left as written.

    q: (rows, heads, tokens, head_dim); returns (rows, tokens, hidden).
    """
    lane, window = turn.lane, memory.config.window
    assert lane.memory is not None
    if lane.policy.dissolves:
        return _read(memory, q, turn)
    begin, end = lane.memory.written, turn.first + turn.tokens
    k, v = lane.pairs(turn, max(0, begin - window), max(0, end - window))
    memory.memory.check_finite(k, v)
    # What left at earlier queries, which might have been taken back, has not been written yet; those read nothing now.
    late = turn.first - begin
    at = lane.memory.places(turn.first, end, end)
    if at is not None:
        q = memory.plain(q, at)
    # Sinks, whose positions may not be known any more, are never written.
    at = lane.memory.places(max(0, begin - window), max(0, end - window), end)
    if at is not None:
        k = memory.plain(k, at)
    live = (torch.arange(begin, end, device=q.device) - window >= memory.config.sink).expand(len(lane.rows), -1)
    # The first tokens push nothing out, until the window is full.
    idle = end - begin - k.shape[2]
    k, v = pad(k, (0, 0, idle, 0)), pad(v, (0, 0, idle, 0))
    before = lane.memory.state_for(memory.memory, k)
    read, after = memory.memory.advance(pad(q, (0, 0, late, 0)), k, v, live, before)
    keep = max(begin, end - turn.hold)
    if keep < end:
        few = keep - begin
        unasked = q.new_zeros((*q.shape[:2], few, q.shape[3]))
        _, after = memory.memory.advance(unasked, k[:, :, :few], v[:, :, :few], live[:, :few], before)
    lane.memory.propose(after, keep)
    return memory.project(read[:, :, late:], q)


def _read(memory: TensorCacheLayer, q: Tensor, turn: Turn) -> Tensor:
    """What a memory behind codecs adds, which has what left before this call; what leaves at the call's end is written then."""
    lane, end = turn.lane, turn.first + turn.tokens
    assert lane.memory is not None
    held = lane.memory
    at = held.places(turn.first, end, end)
    if at is not None:
        q = memory.plain(q, at)

    def absorb(k: Tensor, v: Tensor, place: int) -> None:
        memory.memory.check_finite(k, v)
        at = held.places(place, place + k.shape[2], end)
        k = k if at is None else memory.plain(k, at)
        real = torch.ones((len(lane.rows), k.shape[2]), dtype=torch.bool, device=k.device)
        none = q.new_zeros((*q.shape[:2], k.shape[2], q.shape[3]))
        held.state = memory.memory.advance(none, k, v, real, held.state_for(memory.memory, k))[1].detach()

    held.absorb = absorb
    heads, dim = memory.memory.num_heads, memory.memory.head_dim
    nothing = q.new_zeros((q.shape[0], heads, q.shape[2], dim))
    idle = torch.zeros((q.shape[0], q.shape[2]), dtype=torch.bool, device=q.device)
    read, _ = memory.memory.advance(q, nothing, nothing, idle, held.state_for(memory.memory, nothing))
    return memory.project(read, q)


def _attend(q: Tensor, turn: Turn, mask: GroupMask | None, scale: float, softmax: Softmax) -> Tensor:
    """One softmax over all parts. q: (rows, q_heads, tokens, head_dim), as the result."""
    if len(turn.parts) == 1 and mask is None and softmax.usual:
        fused = _fused(q, turn, scale)
        if fused is not None:
            return fused
    results = []
    for part in turn.parts:
        start, window = _rule(turn, part)
        seen = None
        if mask is not None:
            # The mask may say something else than causality, so a window only hides what is older than it.
            seen = mask.columns(part.start, part.tokens)
            if window is not None and not turn.lane.policy.masked:
                seen = seen & _newer(turn, part, window, q.device)
            start = window = None
        params = AttendParams(scale, seen, softmax.softcap, start, window)
        if isinstance(part.held, Pages):
            results.append(dispatch.attend(q, part.held, params))
        else:
            results.append(dispatch.attend_exact(q, *part.held, params))
    if softmax.s_aux is not None:
        lse = softmax.s_aux.float().view(1, -1, 1).expand(q.shape[:3])
        results.append((torch.zeros_like(results[0][0]), lse))
    return dispatch.merge(results)[0]


def _newer(turn: Turn, part: Part, window: int, device: torch.device) -> Tensor:
    """Whether a key of the part lies within the window of a query, or behind it: (queries, tokens) bool."""
    query = torch.arange(turn.first, turn.first + turn.tokens, device=device)[:, None]
    return torch.arange(part.start, part.start + part.tokens, device=device) > query - window


def _rule(turn: Turn, part: Part) -> tuple[int | None, int | None]:
    """The part's `start` and `window` for the kernels, None where they hide nothing."""
    start, window = turn.first - part.start, part.window
    if window is not None and start + turn.tokens - window <= 0:
        window = None
    if window is None and start >= part.tokens - 1:
        return None, None
    return start, window


def _fused(q: Tensor, turn: Turn, scale: float) -> Tensor | None:
    """PyTorch's own attention, where all that is read is one exact part with a rule that it knows, and many queries read it.

    For a few queries that share keys it is slower than the kernel for them.
    """
    part = turn.parts[0]
    if isinstance(part.held, Pages) or part.held[0].dtype != q.dtype or dispatch.exact_in_cpp(q, *part.held):
        return None
    k, v = part.held
    if v.dtype != q.dtype and not torch.is_autocast_enabled(q.device.type):
        return None
    start, window = _rule(turn, part)
    if window is not None:
        return None
    rows, heads, tokens, dim = q.shape
    if start is None and tokens == 1:
        # The queries of a group become the query tokens of their key head, so keys are not repeated.
        packed = q.reshape(rows, k.shape[1], heads // k.shape[1], dim)
        return scaled_dot_product_attention(packed, k, v, scale=scale).reshape(rows, heads, 1, dim)
    if start == 0 and tokens == part.tokens:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=heads != k.shape[1])
    return None
