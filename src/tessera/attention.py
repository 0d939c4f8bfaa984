"""Tessera's attention: one softmax over all tiers of a cache, registered with transformers as "tessera"."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop_out
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from tessera.associative.infini import Infini
from tessera.associative.layer import TensorCacheLayer
from tessera.associative.rotary import Phase
from tessera.cache.carry import CarriedLayer, Segment
from tessera.cache.lane import Part, Turn
from tessera.cache.layer import ATTENTION, Handle
from tessera.cache.masks import LaneMask, boolean
from tessera.kernels import Pages, dispatch

M = TypeVar("M", bound=nn.Module)


class Limits(NamedTuple):
    """What a model's own attention sees: the newest `window` tokens, the query's own included, and the first `sink`."""

    window: int
    sink: int


#: Where `enable` notes what `disable` shall restore.
_PREVIOUS = "_attention_before_tessera"


def enable(model: M) -> M:
    """Route the attention of `model` (a transformers model) through Tessera. Returns the model; calling it again is harmless.

    Without a `tessera.Cache` the model computes what it did before.

    Raises:
        ValueError: for a model that does not ask transformers' `AttentionInterface` for its attention.
    """
    why = unsupported(model)
    if why:
        raise ValueError(f"tessera.enable: {type(model).__name__} cannot use Tessera's attention: {why}")
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    before = text._attn_implementation
    if before == ATTENTION:
        return model
    _switch(model, ATTENTION)
    if text._attn_implementation != ATTENTION:
        raise ValueError(f"tessera.enable: {type(model).__name__} kept its attention {text._attn_implementation!r}")
    setattr(model, _PREVIOUS, before)
    return model


def disable(model: M) -> M:
    """Give `model` back the attention it had before `enable`. Returns the model."""
    config: Any = model.config
    if config.get_text_config(decoder=True)._attn_implementation == ATTENTION:
        _switch(model, getattr(model, _PREVIOUS, None) or ("sdpa" if getattr(model, "_supports_sdpa", False) else "eager"))
    return model


def unsupported(model: Any) -> str | None:
    """Why the model's attention cannot be replaced, or None if it can."""
    if not hasattr(model, "set_attn_implementation") or not hasattr(model, "config"):
        return "it is not a transformers model"
    if not getattr(model, "_supports_attention_backend", False) or not model._can_set_attn_implementation():
        return "its code computes attention itself and does not ask transformers' AttentionInterface"
    return None


def _switch(model: Any, implementation: str) -> None:
    """Set the attention of the text model only; vision towers keep theirs."""
    config = model.config
    text = config.get_text_config(decoder=True)
    key = next((k for k in config.sub_configs if getattr(config, k, None) is text), None)
    model.set_attn_implementation(implementation if key is None else {key: implementation})


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What models call instead of their own attention.

    Args:
        module: the model's attention module.
        query: (batch, q_heads, tokens, head_dim).
        key: a handle from `tessera.Cache`, or keys (batch, kv_heads, slots, head_dim) from anywhere else.
        value: likewise.
        attention_mask: (batch or 1, heads or 1, tokens, slots), True where a query sees a slot, or None: causal.
        dropout: of the attention weights; only without a handle.
        scaling: of the scores; None: head_dim ** -0.5.
        softcap: scores become softcap · tanh(score / softcap).
        s_aux: (q_heads,) logits of sinks that take part in the softmax and give nothing.
        kwargs: the rest that models pass; the window is in the mask already.

    Returns:
        (batch, tokens, q_heads, head_dim) and no weights.
    """
    memory: TensorCacheLayer | None = getattr(module, "tensor_cache", None)
    infini: Infini | None = getattr(module, "infini", None)
    if isinstance(key, Segment):
        if attention_mask is not None:
            raise ValueError("a Carry is for rows without padding; leave the attention mask out")
        given = key.layer, query, key.new, value.new, kwargs.get("position_ids")
        return _carried(module, *given, dropout, scaling, softcap, s_aux), None
    if infini is not None:
        return _infini(module, infini, query, key, value, scaling, kwargs.get("position_ids")), None
    if not isinstance(key, Handle):
        limits = getattr(module, "limits", None) if memory is None else Limits(memory.config.window, memory.config.sink)
        if limits is not None:
            place, real = _places(query, key, attention_mask)
            if memory is not None:
                memory.pending, _ = memory(query, key, value, real, _positions(query, place, kwargs.get("position_ids")))
            return _windowed(module, limits, query, key, value, place, real, dropout, scaling, softcap, s_aux), None
        attention_mask = _bottom_right(module, query, key) if attention_mask is None else attention_mask
        if softcap is None and s_aux is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        return _dense(module, query, key, value, attention_mask, dropout, scaling, softcap, s_aux), None
    if dropout:
        raise ValueError("attention dropout and tessera.Cache do not go together; call model.eval()")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = key.layer
    turns = layer.open(attention_mask)
    batch, heads, tokens, dim = query.shape
    out: Tensor | None = None
    memory = memory if layer.policy.associative else None
    added = None if memory is None else query.new_zeros((batch, tokens, memory.out.out_features))
    for turn, mask in turns:
        rows = turn.lane.rows
        whole = len(rows) == batch
        index = None if whole else torch.tensor(rows, device=query.device)
        q = query if index is None else query.index_select(0, index)
        if memory is not None and added is not None:
            added[rows, turn.begin :] = _recall(memory, q[:, :, turn.begin :], turn).to(added.dtype)
        part = _attend(q[:, :, turn.begin :], turn, mask, scale, softcap, s_aux).to(query.dtype).transpose(1, 2)
        if whole and not turn.begin:
            out = part.contiguous()
            break
        if out is None:
            out = query.new_zeros((batch, tokens, heads, dim))
        if index is None:
            out[:, turn.begin :] = part
        else:
            out[index, turn.begin :] = part
    layer.close(turns)
    if memory is not None:
        memory.pending = added
    return query.new_zeros((batch, tokens, heads, dim)) if out is None else out, None


def mask_unless_causal(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """What models call for the mask that `attention_forward` is given: transformers' `sdpa_mask`, or None for plain causality.

    That of the newest queries over everything seen before grows with what was seen, and would be made to say nothing.
    """
    causal = mask_function is causal_mask_function and local_size is None and allow_is_causal_skip
    if causal and not torch.compiler.is_compiling():
        newest = int(q_offset) + q_length == int(kv_offset) + kv_length
        if newest and (attention_mask is None or bool(attention_mask.all())):
            return None
    rest = {"attention_mask": attention_mask, "local_size": local_size, "allow_is_causal_skip": allow_is_causal_skip}
    return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, **rest, **kwargs)


def _bottom_right(module: nn.Module, query: Tensor, key: Tensor) -> Tensor | None:
    """The causal mask that was left out, for attention that would take it for that of equally many queries and keys."""
    tokens, slots = query.shape[2], key.shape[2]
    if tokens == 1 or tokens == slots or not getattr(module, "is_causal", True):
        return None
    return torch.ones((1, 1, tokens, slots), dtype=torch.bool, device=query.device).tril(slots - tokens)


def _recall(memory: TensorCacheLayer, q: Tensor, turn: Turn) -> Tensor:
    """What the associative memory adds for the queries of a turn, whose lane then knows the pairs that left as written.

    q: (rows, heads, tokens, head_dim); returns (rows, tokens, hidden).
    """
    lane, window = turn.lane, memory.config.window
    assert lane.memory is not None
    places = torch.arange(turn.first, turn.first + turn.tokens, device=q.device)
    leave = places - window
    k, v = lane.pairs(turn, max(0, turn.first - window), max(0, turn.first + turn.tokens - window))
    memory.memory.check_finite(k, v)
    idle = turn.tokens - k.shape[2]
    # The first tokens push nothing out, until the window is full.
    k, v = pad(memory.plain(k, leave[None, idle:]), (0, 0, idle, 0)), pad(v, (0, 0, idle, 0))
    live = (leave >= memory.config.sink).expand(len(lane.rows), -1)
    query = memory.plain(q, places[None])
    read, lane.memory.coming = memory.memory.advance(query, k, v, live, lane.memory.state_for(memory.memory, k))
    return memory.project(read, query)


def _places(query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """For each slot its place in its row, padding not counted, and whether it is none: (batch, slots) int64 and bool."""
    batch, slots = query.shape[0], key.shape[2]
    real = torch.ones((batch, slots), dtype=torch.bool, device=query.device)
    if mask is not None:
        # A slot that no query of this call sees is padding, if it lies before all that some query sees.
        real = boolean(mask).any(dim=(1, 2)).expand(batch, -1).cumsum(1) > 0
    return torch.arange(slots, device=query.device)[None] - (slots - real.sum(1))[:, None], real


def _positions(query: Tensor, place: Tensor, position_ids: Tensor | None) -> Tensor:
    """Rotary positions of all slots, (batch, slots), from those of the newest."""
    batch, slots = place.shape
    past = slots - query.shape[2]
    if position_ids is None:
        return place.clamp(min=0)
    newest = position_ids.expand(batch, -1)
    if not past:
        return newest
    return (newest[:, :1] - past + torch.arange(slots, device=place.device)).clamp(min=0)


def _windowed(
    module: nn.Module,
    limits: Limits,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    place: Tensor,
    real: Tensor,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Attention to a window and to sinks over plain tensors, differentiable; only what lies near is computed.

    Returns (batch, tokens, heads, head_dim).
    """
    n, slots = query.shape[2], key.shape[2]
    past, window = slots - n, limits.window
    pads = int((place[:, -1:] + 1 - slots).abs().max())
    out = []
    for a in range(0, n, window):
        b = min(a + window, n)
        begin = max(0, past + a - window + 1)
        columns = torch.arange(begin, past + b, device=query.device)
        if begin:
            # The sinks of every row lie among the first slots that are not padding.
            columns = torch.cat((torch.arange(min(begin, pads + limits.sink), device=query.device), columns))
        distance = torch.arange(past + a, past + b, device=query.device)[:, None] - columns
        near = (distance >= 0) & (distance < window)
        sinks = (distance >= 0) & (place[:, None, columns] < limits.sink)
        seen = ((near | sinks) & real[:, None, columns])[:, None]
        # A padding query sees nothing; it is given itself, for a softmax over nothing is NaN.
        seen = seen | ((distance == 0) & ~real[:, past + a : past + b, None])[:, None]
        q, k, v = query[:, :, a:b], key[:, :, columns], value[:, :, columns]
        if softcap is None and s_aux is None:
            drop = dropout if module.training else 0.0
            grouped = query.shape[1] != key.shape[1]
            read = scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=drop, scale=scaling, enable_gqa=grouped)
            out.append(read.transpose(1, 2))
        else:
            out.append(_dense(module, q, k, v, seen, dropout, scaling, softcap, s_aux))
    return torch.cat(out, dim=1).contiguous()


def _infini(
    module: Any, infini: Infini, query: Tensor, key: Any, value: Any, scaling: float | None, position_ids: Tensor | None
) -> Tensor:
    """Infini-attention over whole sequences; (batch, tokens, heads, head_dim)."""
    if isinstance(key, Handle):
        raise ValueError("Infini-attention keeps its own memory; run this model without a tessera.Cache")
    place, _ = _places(query, key, None)
    positions = _positions(query, place, position_ids)
    n, past = query.shape[2], key.shape[2] - query.shape[2]
    phase: Phase = module.infini_phase[0]
    plain_q, plain_k = phase.remove(query, positions[:, past:]), phase.remove(key, positions)
    if past:
        # The memory is made again from all tokens; queries that were answered before are not asked again.
        query, plain_q = (torch.cat((x.new_zeros((*x.shape[:2], past, x.shape[3])), x), dim=2) for x in (query, plain_q))
    out, _ = infini(query, key, value, plain_q, plain_k, scaling)
    return out[:, :, past : past + n].transpose(1, 2).contiguous()


def _carried(
    module: Any,
    layer: CarriedLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_ids: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """The next segment of documents whose state `layer` carries on; (batch, tokens, heads, head_dim)."""
    batch, n = query.shape[0], query.shape[2]
    positions = torch.arange(n, device=query.device)[None] + layer.seen if position_ids is None else position_ids
    layer.seen += n
    if getattr(module, "infini", None) is not None:
        phase: Phase = module.infini_phase[0]
        plain = phase.remove(query, positions), phase.remove(key, positions)
        out, layer.infini = module.infini(query, key, value, *plain, scaling, layer.infini)
        return out.transpose(1, 2).contiguous()
    memory: TensorCacheLayer | None = getattr(module, "tensor_cache", None)
    limits = module.limits if memory is None else Limits(memory.config.window, memory.config.sink)
    if memory is not None:
        real = torch.ones((batch, n), dtype=torch.bool, device=query.device)
        memory.pending, layer.memory = memory(query, key, value, real, positions, layer.memory)
    key, value = layer.joined(key, value)
    # By slot instead of place: what was carried begins with the sinks, and all behind them are neighbours.
    slots = torch.arange(key.shape[2], device=query.device).expand(batch, -1)
    out = _windowed(module, limits, query, key, value, slots, slots >= 0, dropout, scaling, softcap, s_aux)
    layer.keep(key, value, limits.sink, limits.window)
    return out


def _attend(q: Tensor, turn: Turn, mask: LaneMask | None, scale: float, softcap: float | None, s_aux: Tensor | None) -> Tensor:
    """One softmax over all parts. q: (rows, q_heads, tokens, head_dim), as the result."""
    if len(turn.parts) == 1 and mask is None and softcap is None and s_aux is None:
        fused = _fused(q, turn, scale)
        if fused is not None:
            return fused
    results = []
    for part in turn.parts:
        start, window = _rule(turn, part)
        seen = None if mask is None else mask.columns(part.start, part.tokens)
        if mask is not None and window is None:
            start = None  # the mask says it all, and may say something else than causality
        if isinstance(part.held, Pages):
            results.append(dispatch.attend(q, part.held, scale, mask=seen, softcap=softcap, start=start, window=window))
        else:
            results.append(dispatch.attend_exact(q, *part.held, scale, mask=seen, softcap=softcap, start=start, window=window))
    if s_aux is not None:
        lse = s_aux.float().view(1, -1, 1).expand(q.shape[:3])
        results.append((torch.zeros_like(results[0][0]), lse))
    return dispatch.merge(results)[0]


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


def _dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Attention with soft-capping and sinks over plain tensors, differentiable; PyTorch's own has neither."""
    batch, heads, tokens, dim = query.shape
    slots = key.shape[2]
    grouped = query.reshape(batch, key.shape[1], -1, dim)
    scores = (grouped @ key.transpose(-1, -2)).view(batch, heads, tokens, slots).float()
    scores = scores * (dim**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        seen = boolean(mask)
    elif tokens > 1 and getattr(module, "is_causal", True):
        # transformers leaves the mask out only where query i sees the slots up to i.
        seen = torch.ones(tokens, slots, dtype=torch.bool, device=query.device).tril()
    else:
        seen = torch.ones(1, 1, dtype=torch.bool, device=query.device)
    scores = scores.masked_fill(~seen, torch.finfo(torch.float32).min)
    if s_aux is not None:
        sinks = s_aux.float().view(1, -1, 1, 1).expand(batch, heads, tokens, 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    weights = drop_out(weights.to(value.dtype), dropout, module.training)
    out = weights.view(batch, key.shape[1], -1, slots) @ value
    return out.view(batch, heads, tokens, -1).transpose(1, 2).contiguous()


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, mask_unless_causal)
