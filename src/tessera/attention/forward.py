"""The attention function and the mask function that models call instead of their own."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from tessera.attention.documents import SlidingWindow
from tessera.attention.infini_attention import over_whole
from tessera.attention.over_segment import over_segment
from tessera.attention.over_tiers import over_tiers
from tessera.attention.past import recall, tokens_so_far
from tessera.attention.read_masks import read_documents
from tessera.attention.windowed import Softmax, dense, windowed
from tessera.cache_layers.cache_layer import ATTENTION, DeferredKV
from tessera.cache_layers.deferred import UNCOMPILED
from tessera.cache_layers.masks import by_lengths
from tessera.cache_layers.new_tokens import whole
from tessera.cache_layers.padding_mask import PaddingMask, by_padding, on_host
from tessera.cache_layers.truncated_bptt import Segment
from tessera.tensor_cache.gated_read import MemoryCall
from tessera.tensor_cache.infini import Infini

#: Attribute of a mask of a static cache, such as transformers' StaticCache, with its number of slots.
ROOM = "_tessera_room"

#: What transformers masks a sliding window with, to tell it from other functions.
_SLIDING: Any = sliding_window_causal_mask_function(1)

#: torch.compile breaks its graph here: what tiers hold changes from call to call, and kernels are no part of a graph.
_over_tiers = torch.compiler.disable(over_tiers, reason=UNCOMPILED)


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
    memory_call: MemoryCall | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention in place of a model's own attention function.

    Args:
        module: the model's attention module.
        query: (batch, q_heads, tokens, head_dim).
        key: deferred keys or values from `tessera.Cache`, or keys (batch, kv_heads, slots, head_dim) from anywhere else.
        value: likewise.
        attention_mask: (batch or 1, heads or 1, tokens, slots), True where a query sees a slot, or None: causal.
        dropout: dropout rate of the attention weights; only without deferred keys.
        scaling: what scores are multiplied by; None: head_dim ** -0.5.
        softcap: scores become softcap · tanh(score / softcap).
        s_aux: (q_heads,) logits of sinks that take part in the softmax and have no value.
        memory_call: the call of a module with a Tensor Cache; what the cache adds to the module's output is left there.
        kwargs: other arguments that models pass, ignored; the window is in the mask already.

    Returns:
        (batch, tokens, q_heads, head_dim) and no weights.
    """
    if memory_call is not None:
        memory_call.taken = True
    infini = cast("Infini | None", module._modules.get("infini"))  # `getattr` is slow for what is not there
    softmax = Softmax(dropout, scaling, softcap, s_aux)
    lengths = kwargs.get("cu_seq_lens_q")
    if not isinstance(key, DeferredKV):
        attention_mask = _unless_all(attention_mask)
    if isinstance(key, Segment):
        if attention_mask is not None or lengths is not None:
            raise ValueError(
                "a TruncatedBPTTCache is for rows without padding or packed documents; leave the attention mask out"
            )
        return over_segment(
            module, key.layer, query, key.new, value.new, kwargs.get("position_ids"), softmax, memory_call
        ), None
    if isinstance(key, DeferredKV):
        if infini is not None:
            raise ValueError("Infini-attention keeps its own memory; run this model without a tessera.Cache")
        if lengths is not None:
            raise ValueError("packed documents given by cu_seq_lens_q are for calls without a cache; use_cache=False")
        return _over_tiers(module, query, key, attention_mask, softmax, memory_call), None
    room = getattr(attention_mask, ROOM, 0)
    if room and attention_mask is not None:
        key, value, attention_mask = key[:, :, :-room], value[:, :, :-room], attention_mask[..., :-room]
    limits: SlidingWindow | None = getattr(module, "limits", None)
    if memory_call is not None:
        limits = SlidingWindow(memory_call.memory.config.window, memory_call.memory.config.sink)
    if lengths is not None and (infini is not None or limits is not None):
        attention_mask = by_lengths(lengths, attention_mask, query.shape[0], query.shape[2], key.shape[2])
    if infini is not None:
        return over_whole(module, infini, query, key, value, attention_mask, scaling, kwargs.get("position_ids")), None
    if limits is not None:
        return _bounded(module, limits, query, key, value, attention_mask, softmax, memory_call), None
    attention_mask = _bottom_right(module, query, key) if attention_mask is None else whole(attention_mask)
    if softmax.usual:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    return dense(module, query, key, value, attention_mask, softmax), None


def _bounded(
    module: nn.Module,
    limits: SlidingWindow,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    softmax: Softmax,
    call: MemoryCall | None,
) -> Tensor:
    """Attention to a window and sinks over plain keys and values, with the contribution of a Tensor Cache."""
    if torch.compiler.is_compiling() and mask is not None and key.shape[2] > query.shape[2]:
        raise ValueError("a window over a cache of fixed length cannot be compiled; generate(..., disable_compile=True)")
    if call is None:
        said = read_documents(mask, query, key.shape[2], limits)
    else:
        past, said = tokens_so_far(call, query, key.shape[2], mask, limits)
        call.added = recall(call, past, query, key, value)
    return windowed(module, limits, query, key, value, said, softmax)


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
    """Make the mask for `attention_forward`: transformers' `sdpa_mask`, or None for plain causality.

    One that is made of padding, and perhaps of a window, is made when something has to see it whole: it grows with what was
    seen before, mostly to say nothing. What it says is read once a call, with what else there is to be read.
    """
    rest = {"attention_mask": attention_mask, "local_size": local_size, **kwargs}
    compiling = torch.compiler.is_compiling()
    room = 0
    if not compiling:
        # Static caches count in tensors, which have moved on when a mask is made later.
        q_offset, kv_offset, kv_length = int(q_offset), int(kv_offset), int(kv_length)
        room = kv_offset + kv_length - q_offset - q_length
    simple, window = _window(mask_function, local_size)
    if simple and allow_is_causal_skip and not room and not compiling:
        if attention_mask is None and window is None:
            return None
        padding = None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + kv_length]
        if padding is None or (padding.dtype == torch.bool and padding.shape == (batch_size, kv_length)):
            device = torch.device(kwargs.get("device", "cpu") if padding is None else padding.device)
            whole = {**rest, "allow_is_causal_skip": False}

            def make() -> Tensor:
                if q_length == 1 and window is None and padding is not None:
                    return padding[:, None, None]
                made: Tensor = sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, **whole)
                return made

            told = None if padding is None or attention_mask is None else on_host(attention_mask, kv_offset, kv_length)
            return PaddingMask((batch_size, 1, q_length, kv_length), device, told, window, make)
    skip = allow_is_causal_skip and not room and (compiling or q_length > 1)
    # A mask that is left out is taken for that of the newest queries.
    rest["allow_is_causal_skip"] = skip
    mask: Tensor | None = sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, **rest)
    if mask is not None and room > 0:
        setattr(mask, ROOM, room)
    return mask


def _window(mask_function: Any, local_size: int | None) -> tuple[bool, int | None]:
    """Whether a mask function is causality, perhaps within a window of `local_size`, and nothing else; and that window."""
    if mask_function is causal_mask_function:
        return local_size is None, None
    if local_size is None or getattr(mask_function, "__code__", None) is not _SLIDING.__code__:
        return False, None
    # Both are made of a window's overlay and causality: the same functions about other numbers.
    (own,), (parts,) = ([cell.cell_contents for cell in each.__closure__] for each in (_SLIDING, mask_function))
    same = len(parts) == 2 and parts[1] is causal_mask_function and getattr(parts[0], "__code__", None) is own[0].__code__
    return same and [cell.cell_contents for cell in parts[0].__closure__] == [local_size], local_size


def _unless_all(mask: Tensor | None) -> Tensor | None:
    """The mask, or None if it hides nothing, which is looked at once for all layers."""
    if not by_padding(mask):
        return None if mask is None else whole(mask)
    # What is compiled cannot depend on what is read; and where one token sees a window, to look costs more than the mask.
    if torch.compiler.is_compiling():
        return mask.whole
    if mask.window is not None and (mask.shape[2] == 1 or mask.shape[3] >= mask.window):
        return mask.whole
    real = mask.real_slots()
    return None if real is None or real.all() else mask


def _bottom_right(module: nn.Module, query: Tensor, key: Tensor) -> Tensor | None:
    """Make the causal mask that was omitted, for attention that would assume equally many queries and keys."""
    tokens, slots = query.shape[2], key.shape[2]
    if tokens == 1 or tokens == slots or not getattr(module, "is_causal", True):
        return None
    return torch.ones((1, 1, tokens, slots), dtype=torch.bool, device=query.device).tril(slots - tokens)


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, mask_unless_causal)
