"""`tessera.kernels.recurrent_grid.advance` in C++, forward and backward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tessera.kernels.cpu import _cpu, addresses, float32_refusal, levels, tracked
from tessera.kernels.recurrent_grid import Gates, Steps


def refusal(h: Tensor, steps: Steps, gates: Gates) -> str | None:
    """Say why `advance` cannot be used, or return None if it can."""
    return float32_refusal((h, *steps.tensors(), *gates.tensors()))


def advance(
    h: Tensor, c: Tensor, steps: Steps, gates: Gates, level: str | None = None, every: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`tessera.kernels.recurrent_grid.advance`. It is parallel over sequences.

    Args:
        h, c, steps, gates, every: as there.
        level: instruction set; None: the best there is.
    """
    count = steps.read.shape[1]
    if not count or not len(h):
        return h.new_zeros((*steps.read.shape[:3], h.shape[1])), h, c
    given = tracked((h, c, *steps.tensors(), *gates.tensors()))
    every = every or math.isqrt(count)
    return _Advance.apply(level or levels()[-1], every, gates.see_state, *given)


class _Advance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, level: str, every: int, see_state: bool, *given: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        plain = [None if x is None else x.detach().contiguous() for x in given]
        h, read = plain[0], plain[8]
        assert h is not None
        assert read is not None
        batch, steps, reads = read.shape[:3]
        channels = h.shape[1]
        ctx.level = level
        ctx.shape = [batch, steps, reads, *h.shape[1:], see_state, every, torch.get_num_threads()]
        out, new_h, new_c = read.new_empty((batch, steps, reads, channels)), torch.empty_like(h), torch.empty_like(h)
        kept = None
        if any(ctx.needs_input_grad):
            kept = h.new_empty((batch, -(-steps // every), 2, h[0, 0].numel(), -(-channels // 16) * 16))
        _cpu.advance(level, ctx.shape, addresses(plain), addresses((out, new_h, new_c, kept)))
        ctx.save_for_backward(kept, *plain)
        return out, new_h, new_c

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept, *given = ctx.saved_tensors
        batch = len(kept)
        whole = [x.contiguous() for x in grads]
        # Each sequence has its own gradients of the weights, which are then added in a fixed order.
        found = [None if x is None else torch.empty_like(x) for x in given[:9]]
        found += [None if x is None else x.new_empty((batch, *x.shape)) for x in given[9:]]
        _cpu.retreat(ctx.level, ctx.shape, addresses(given), kept.data_ptr(), addresses(whole), addresses(found))
        return None, None, None, *found[:9], *(None if x is None else x.sum(0) for x in found[9:])
