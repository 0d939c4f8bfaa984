"""The recurrence of a grid of cells, in PyTorch.

What does not depend on the state is computed for many steps at once.

At step t, with hidden h and cell c of shape (batch, channels, depth, height, width):

    read   h at some places, by trilinear interpolation
    V      = the outer product of one vector for each axis, a channel at a time
    gates  i, f, o, g = W [V, S h] + b, where S is a stencil of three cells along each axis in turn; or W V + b
    new    c' = sigmoid(f) c + sigmoid(i) tanh(g),  h' = sigmoid(o) tanh(c')
    update c, h <- c', h'; or, with a mask M, c + M (c' - c) and h + M (h' - h)

Grids of one or two axes have one cell along those in front. Steps are processed in segments: only the states between segments
are kept for backward, which recomputes each segment. Where the gates do not see h, the recurrence is linear in c, and in h
given c, and a segment is computed at once (`linear_scan`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv3d, grid_sample

from tessera.devices import upload
from tessera.kernels.precision import without_autocast

#: Maximum number of elements of each intermediate result of a segment.
_SEGMENT = 1 << 22


@dataclass(frozen=True, eq=False)
class Steps:
    """The inputs of each step.

    Attributes:
        written: V's vectors by axis, (batch, steps, size, channels) each.
        mask: the vectors of M by axis, (batch, steps, size) each; None: all cells are updated. Where it is zero an
            implementation may skip the cell, gradients of the mask included.
        read: (batch, steps, reads, 3), places in cells, from 0 to size - 1.
    """

    written: tuple[Tensor, Tensor, Tensor]
    mask: tuple[Tensor, Tensor, Tensor] | None
    read: Tensor

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors of these."""
        return (*self.written, *(self.mask or (None, None, None)), self.read)

    def part(self, begin: int, end: int) -> Steps:
        """Return the steps [begin, end)."""
        mask = None if self.mask is None else tuple(m[:, begin:end] for m in self.mask)
        return Steps(tuple(x[:, begin:end] for x in self.written), mask, self.read[:, begin:end])  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Gates:
    """The parameters of the gates.

    Attributes:
        weight: W, (4 channels, 2 channels): rows i, f, o, g, columns V, h; or (4 channels, channels): h is not seen.
        bias: b, (4 channels,).
        taps: weights of S, (3, channels, 3): axis, channel, cell before, itself, cell behind; None: S h is h.
    """

    weight: Tensor
    bias: Tensor
    taps: Tensor | None

    @property
    def see_state(self) -> bool:
        """Whether the gates depend on h."""
        return self.weight.shape[1] == self.weight.shape[0] // 2

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors of these."""
        return (self.weight, self.bias, self.taps)


def interpolate(h: Tensor, at: Tensor) -> Tensor:
    """h: (batch, channels, depth, height, width), at: (batch, reads, 3) in cells -> (batch, reads, channels)."""
    last = upload(torch.tensor([max(1, size - 1) for size in h.shape[2:]], dtype=at.dtype), at.device)
    places = (2 * at / last - 1).flip(-1)[:, :, None, None]
    read = grid_sample(h, places, mode="bilinear", padding_mode="border", align_corners=True)
    return read[..., 0, 0].transpose(1, 2)


def stencil(h: Tensor, taps: Tensor) -> Tensor:
    """S h, (batch, channels, depth, height, width); beyond the border there are zeros. taps: (3, channels, 3)."""
    kernel = torch.einsum("ci,cj,ck->cijk", *taps.unbind(0)).unsqueeze(1)
    return conv3d(h, kernel, padding=1, groups=h.shape[1])


def outer(vectors: Sequence[Tensor]) -> Tensor:
    """(batch, steps, size, channels) by axis -> (batch, steps, channels, depth, height, width)."""
    return torch.einsum("btdc,bthc,btwc->btcdhw", *vectors)


@without_autocast
def advance(
    h: Tensor, c: Tensor, steps: Steps, gates: Gates, every: int | None = None, compiled: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence over all steps.

    Args:
        h, c: (batch, channels, depth, height, width).
        steps, gates: see there.
        every: steps in a segment; None: chosen by size.
        compiled: whether steps are compiled by `torch.compile`, which takes a while for each new shape.

    Returns:
        what each step read of the state before it, (batch, steps, reads, channels); h and c after the last.
    """
    count, cells = steps.read.shape[1], h.numel()
    most = max(1, _SEGMENT // max(1, 4 * cells))
    every = every or min(most, max(1, math.isqrt(count) if gates.see_state else count))
    given = (h, c, *steps.tensors(), *gates.tensors())
    if count <= every or not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)):
        return _segments(h, c, steps, gates, every, compiled)[:3]
    return _Recomputed.apply(every, compiled, *given)


def advance_compiled(h: Tensor, c: Tensor, steps: Steps, gates: Gates) -> tuple[Tensor, Tensor, Tensor]:
    """Run `advance` with steps that `torch.compile` compiles to Triton."""
    return advance(h, c, steps, gates, compiled=True)


def _segments(
    h: Tensor, c: Tensor, steps: Steps, gates: Gates, every: int, compiled: bool
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Run `advance`, and also return the states before each segment."""
    reads, kept = [], []
    for begin in range(0, steps.read.shape[1], every):
        kept += [h, c]
        read, h, c = _segment(h, c, steps.part(begin, begin + every), gates, compiled)
        reads.append(read)
    none = h.new_zeros((*steps.read.shape[:3], h.shape[1]))
    return (torch.cat(reads, dim=1) if reads else none), h, c, kept


def _segment(h: Tensor, c: Tensor, steps: Steps, gates: Gates, compiled: bool) -> tuple[Tensor, Tensor, Tensor]:
    channels = h.shape[1]
    v = outer(steps.written)
    seen = (gates.weight[:, :channels] @ v.flatten(3) + gates.bias[:, None]).unflatten(3, h.shape[2:])
    mask = None if steps.mask is None else torch.einsum("btd,bth,btw->btdhw", *steps.mask).unsqueeze(2)
    if not gates.see_state:
        return _linear_segment(h, c, seen, mask, steps.read)
    weight = gates.weight[:, channels:]
    one_step = _compiled_step() if compiled else _step
    reads = []
    for t, own in enumerate(seen.unbind(1)):
        share = None if mask is None else mask[:, t]
        read, h, c = one_step(h, c, own, share, steps.read[:, t], weight, gates.taps)
        reads.append(read)
    return torch.stack(reads, dim=1), h, c


def _step(
    h: Tensor, c: Tensor, seen: Tensor, mask: Tensor | None, read: Tensor, weight: Tensor, taps: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the part of one step that depends on the state; `seen` is W V + b."""
    found = interpolate(h, read)
    near = h if taps is None else stencil(h, taps)
    i, f, o, g = (seen + (weight @ near.flatten(2)).view_as(seen)).chunk(4, dim=1)
    new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    new_h = o.sigmoid() * new_c.tanh()
    if mask is None:
        return found, new_h, new_c
    return found, torch.lerp(h, new_h, mask), torch.lerp(c, new_c, mask)


@cache
def _compiled_step() -> Any:
    """Compile `_step` by `torch.compile`: a single step, so that it is compiled once for any number of steps."""
    return torch.compile(_step, dynamic=False)


def _linear_segment(h: Tensor, c: Tensor, seen: Tensor, mask: Tensor | None, read: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    i, f, o, g = seen.chunk(4, dim=2)
    forget, added = f.sigmoid(), i.sigmoid() * g.tanh()
    cells: Tensor
    if mask is None:
        cells = linear_scan(forget, added, c)
        hidden = o.sigmoid() * cells.tanh()
    else:
        cells = linear_scan(1 - mask + mask * forget, mask * added, c)
        before = torch.cat((c.unsqueeze(1), cells[:, :-1]), dim=1)
        hidden = linear_scan((1 - mask).expand_as(o), mask * o.sigmoid() * (forget * before + added).tanh(), h)
    past = torch.cat((h.unsqueeze(1), hidden[:, :-1]), dim=1)
    reads = interpolate(past.flatten(0, 1), read.flatten(0, 1)).unflatten(0, read.shape[:2])
    return reads, hidden[:, -1], cells[:, -1]


def linear_scan(decay: Tensor, added: Tensor, start: Tensor) -> Tensor:
    """x_t = decay_t x_{t-1} + added_t for all t at once.

    Args:
        decay, added: (batch, steps, ...), decay in [0, 1].
        start: (batch, ...).

    Returns:
        (batch, steps, ...).
    """
    return _LinearScan.apply(decay, added, start)


def _doubling(decay: Tensor, x: Tensor) -> Tensor:
    """Compute `linear_scan` from zero by joining spans of 1, 2, 4, ... steps. Decays are only multiplied, so none overflows."""
    span, steps = 1, x.shape[1]
    while span < steps:
        x = torch.cat((x[:, :span], x[:, span:] + decay[:, span:] * x[:, :-span]), dim=1)
        decay = torch.cat((decay[:, :span], decay[:, span:] * decay[:, :-span]), dim=1)
        span *= 2
    return x


class _LinearScan(torch.autograd.Function):
    """A linear scan, whose backward is a linear scan in reverse."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, added: Tensor, start: Tensor) -> Tensor:
        first = added[:, :1] + decay[:, :1] * start.unsqueeze(1)
        x = _doubling(decay, torch.cat((first, added[:, 1:]), dim=1))
        ctx.save_for_backward(decay, x, start)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, x, start = ctx.saved_tensors
        later = torch.cat((decay[:, 1:], torch.zeros_like(decay[:, :1])), dim=1)
        grad = _doubling(later.flip(1), grad.flip(1)).flip(1)
        before = torch.cat((start.unsqueeze(1), x[:, :-1]), dim=1)
        return grad * before, grad, grad[:, 0] * decay[:, 0]


class _Recomputed(torch.autograd.Function):
    """Segments that backward recomputes one after the other, the last first."""

    @staticmethod
    def forward(ctx: Any, every: int, compiled: bool, *given: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        h, c, steps, gates = _apart(given)
        reads, h, c, kept = _segments(h, c, steps, gates, every, compiled)
        ctx.every, ctx.compiled, ctx.states = every, compiled, len(kept)
        ctx.save_for_backward(*kept, *given[2:])
        return reads, h, c

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_reads: Tensor, d_h: Tensor, d_c: Tensor) -> tuple[Tensor | None, ...]:
        kept, rest = ctx.saved_tensors[: ctx.states], ctx.saved_tensors[ctx.states :]
        needed = ctx.needs_input_grad[4:]
        _, _, steps, _ = _apart((kept[0], kept[1], *rest))
        sums: list[Any] = [None if not wanted else [] for wanted in needed]
        for number in reversed(range(ctx.states // 2)):
            begin = number * ctx.every
            now = steps.part(begin, begin + ctx.every)
            own = [*now.tensors(), *rest[-3:]]
            leaves = [None if x is None else x.detach().requires_grad_(bool(w)) for x, w in zip(own, needed, strict=True)]
            h, c = (x.detach().requires_grad_() for x in kept[2 * number : 2 * number + 2])
            with torch.enable_grad():
                results = _segment(*_apart((h, c, *leaves)), ctx.compiled)
            grads = (d_reads[:, begin : begin + ctx.every], d_h, d_c)
            wanted = [x for x in leaves if x is not None and x.requires_grad]
            d_h, d_c, *found = torch.autograd.grad(results, [h, c, *wanted], grads, allow_unused=True, materialize_grads=True)
            for place, x in enumerate(leaves):
                if x is not None and x.requires_grad:
                    sums[place].append(found.pop(0))
        joined = [torch.cat(x[::-1], dim=1) if x else None for x in sums[:7]]
        return None, None, d_h, d_c, *joined, *(sum(x) if x else None for x in sums[7:])


def _apart(given: Sequence[Any]) -> tuple[Tensor, Tensor, Steps, Gates]:
    h, c, w0, w1, w2, m0, m1, m2, read, weight, bias, taps = given
    mask = None if m0 is None else (m0, m1, m2)
    return h, c, Steps((w0, w1, w2), mask, read), Gates(weight, bias, taps)
