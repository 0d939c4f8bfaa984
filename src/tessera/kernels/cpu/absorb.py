"""The recurrence of `tessera.tensor_cache.recurrence` in C++, forward and backward, for the outer and the delta rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tessera.kernels.cpu import _cpu, addresses, float32_refusal, levels, tracked

#: Tokens between two matrices that are kept for backward, chosen so that the matrices in between fit a core's cache.
_EVERY = 32


def refusal(*tensors: Tensor) -> str | None:
    """Say why `absorb` cannot be used, or return None if it can."""
    return float32_refusal(tensors)


def absorb(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    eta: Tensor,
    state: Tensor,
    delta: bool,
    read_first: bool = False,
    level: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`tessera.tensor_cache.recurrence.loop`; shapes as there. Forward is parallel over columns, backward over heads.

    Args:
        q, k, v, g, eta, state: as there.
        delta: the delta rule, not the outer one.
        read_first: a query reads what was there before its token's write.
        level: instruction set; None: the best there is.

    There is no second derivative.

    Raises:
        ValueError: for shapes that do not fit each other.
    """
    batch, heads, _, tokens, d_k = q.shape
    d_v = v.shape[-1]
    pairs, one = (batch, heads, tokens), (batch, heads, d_k, d_v)
    expected = {"k": (k, (*pairs, d_k)), "v": (v, (*pairs, d_v)), "g": (g, pairs), "eta": (eta, pairs), "state": (state, one)}
    for name, (x, shape) in expected.items():
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} {tuple(x.shape)} does not fit queries {tuple(q.shape)}: expected {shape}")
    if not q.numel() or not v.numel():
        return q.new_zeros((*q.shape[:4], v.shape[-1])), state
    given = tracked((q, k, v, g.exp(), eta, state))
    found: tuple[Tensor, Tensor] = _Absorb.apply(level or levels()[-1], delta, read_first, *given)
    return found


class _Absorb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, level: str, delta: bool, read_first: bool, *given: Tensor) -> tuple[Tensor, Tensor]:
        plain = [x.detach().contiguous() for x in given]
        q, _, v, _, _, state = plain
        batch, heads, group, tokens, d_k = q.shape
        n, d_v = batch * heads, v.shape[-1]
        ctx.level, ctx.shape = level, [n, tokens, group, d_k, d_v, delta, read_first, _EVERY, torch.get_num_threads()]
        read, end = q.new_empty((batch, heads, group, tokens, d_v)), torch.empty_like(state)
        kept, fresh = q.new_empty(0), v
        if any(ctx.needs_input_grad):
            kept = q.new_empty((n, -(-tokens // _EVERY), d_k, -(-d_v // 16) * 16))
            fresh = torch.empty_like(v) if delta else v
        left = [0, 0] if not kept.numel() else [kept.data_ptr(), fresh.data_ptr() if delta else 0]
        _cpu.absorb(level, ctx.shape, addresses(plain), *left, addresses((read, end)))
        ctx.save_for_backward(kept, fresh, *plain[:5])
        return read, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept, fresh, *given = ctx.saved_tensors
        batch, heads, _, _, d_k = given[0].shape
        found = [*(torch.empty_like(x) for x in given), kept.new_empty((batch, heads, d_k, given[2].shape[-1]))]
        whole = [x.contiguous() for x in grads]
        left = (kept.data_ptr(), fresh.data_ptr())
        # The initial state is the first of the kept ones.
        _cpu.absorb_backward(ctx.level, ctx.shape, addresses((*given, None)), *left, addresses(whole), addresses(found))
        return None, None, None, *found
