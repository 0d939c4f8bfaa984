"""The recurrence of recurrence.py in chunks of C tokens, forward and backward.

With G the running sum of g within a chunk, half = G_C / 2, and S the matrix before the chunk, decays are split between the two
factors of every product, relative to the middle of the chunk:

    Q' = exp(G - half) Q,   K' = exp(half - G) K,   S' = exp(half) S

    outer   U = diag(η) V
    delta   (1 + L) U = diag(η) V - B S',   B = diag(β exp(G - half)) K,   L = B K'ᵀ below the diagonal,   β = η / λ
    both    R = Q' S' + P U,   P = Q' K'ᵀ up to the diagonal;   S becomes exp(half) (S' + K'ᵀ U)

(the UT form of a gated delta rule: arXiv 2406.06484, 2412.06464). With T = (1 + L)⁻¹, U = T diag(η) V - T B S'. What does not
depend on S is computed for all chunks at once; only the products with S go from chunk to chunk, in the backward pass those with
its gradient. Everything is in float32: a decay of 0.999 is 1 in bfloat16.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from tessera.tensor_cache.recurrence import wedge
from tessera.tensor_cache.tensor_cache_config import Order, Rule

#: The smallest logarithm of a token's decay: the remaining 4e-18 of a matrix are below the rounding of any write.
_LEAST = -40.0


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    eta: Tensor,
    state: Tensor,
    rule: Rule,
    order: Order = "write_first",
    chunk: int = 64,
    least: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `tessera.tensor_cache.recurrence.loop`, `chunk` tokens at a time. Any number of tokens; shapes as there.

    Args:
        q, k, v, g, eta, state, rule, order: as there.
        chunk: most tokens of a chunk.
        least: a number that no g is below, if one is known; None: the host reads g, and waits for its device.
    """
    batch, heads, group, tokens, _ = q.shape
    if tokens == 0:
        return q.new_zeros((*q.shape[:4], v.shape[-1])), state
    if rule == "wedge":
        return wedge(scan, q, k, v, g, eta, state, order, chunk, least)
    g = g.clamp(min=_LEAST)
    size = -(-tokens // -(-tokens // chunk))  # the same number of chunks, of equal size, with little padding
    while size > 2 and _decay(g, size, least) < 2 * _LEAST:
        size = (size + 1) // 2  # the factors of a decay must be within the range of float32
    # Chunks come first, so that each is contiguous; the query heads of a group become rows of their chunk.
    q = _cut(q, 3, size).movedim(3, 0).flatten(3, 4).flatten(1, 2)
    k, v, g, eta = (_cut(x, 2, size).movedim(2, 0).flatten(1, 2) for x in (k, v, g, eta))
    read, end = _Scan.apply(q, k, v, g, eta, state.flatten(0, 1), rule == "delta", order == "read_first")
    read = read.unflatten(2, (group, size)).movedim(0, 2).flatten(2, 3).unflatten(0, (batch, heads))
    return read[:, :, :, :tokens], end.unflatten(0, (batch, heads))


def _decay(g: Tensor, size: int, least: float | None) -> float:
    """The smallest logarithm of a chunk's decay, or a number below it."""
    return float(_cut(g.detach(), 2, size).sum(-1).amin()) if least is None else max(least, _LEAST) * size


def _cut(x: Tensor, dim: int, size: int) -> Tensor:
    """Split a dimension of tokens into chunks and tokens. Padding is zero: tokens without decay and without a write."""
    rest = -x.shape[dim] % size
    return pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, rest)).unflatten(dim, (-1, size)) if rest else x.unflatten(dim, (-1, size))


class _Factors(NamedTuple):
    """The factors of decays on each side of a product, with a last dimension of 1: to Q', to K', to B / η, to S'."""

    read: Tensor
    write: Tensor
    correct: Tensor
    half: Tensor

    @staticmethod
    def of(g: Tensor, group: int, read_first: bool) -> _Factors:
        """g: (chunks, n, size)."""
        sums = g.cumsum(-1)
        half = sums[..., -1:] / 2
        read = (sums - g if read_first else sums) - half
        if group > 1:
            read = read.repeat(1, 1, group)
        return _Factors(*(x.unsqueeze(-1) for x in (read.exp(), (half - sums).exp(), (sums - g - half).exp(), half.exp())))


class _Scan(torch.autograd.Function):
    """q: (chunks, n, group · size, d_k), k: (chunks, n, size, d_k), v: (chunks, n, size, d_v), g, eta: (chunks, n, size),
    state: (n, d_k, d_v); returns the reads (chunks, n, group · size, d_v) and the state at the end."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, eta: Tensor, state: Tensor, delta: bool, read_first: bool
    ) -> tuple[Tensor, Tensor]:
        group = q.shape[2] // k.shape[2]
        f = _Factors.of(g, group, read_first)
        q, k_write = q * f.read, k * f.write
        local = _lower(q @ k_write.mT, group, -1 if read_first else 0)
        fresh = eta.unsqueeze(-1) * v
        k_correct = inverse = stale = None
        if delta:
            k_correct = k * (eta.unsqueeze(-1) * f.correct)
            lower = (k_correct @ k_write.mT).tril(-1)
            one = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
            inverse = torch.linalg.solve_triangular(lower, one, upper=False, unitriangular=True)
            fresh, stale = inverse @ fresh, inverse @ k_correct
        states, written = [state], []
        scaled = []
        for c, (half, keys, u) in enumerate(zip(f.half, k_write.mT, fresh, strict=True)):
            scaled.append(half * states[-1])
            if stale is not None:
                u = torch.baddbmm(u, stale[c], scaled[-1], alpha=-1)
                written.append(u)
            states.append(half * torch.baddbmm(scaled[-1], keys, u))
        before, u = torch.stack(scaled), torch.stack(written) if written else fresh
        ctx.save_for_backward(k, v, g, eta, q, k_write, k_correct, local, inverse, stale, fresh, u, before, states[-1])
        ctx.group, ctx.read_first = group, read_first
        return local @ u + q @ before, states[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        k, v, g, eta, q, k_write, k_correct, local, inverse, stale, fresh, u, before, end = ctx.saved_tensors
        d_read, d_state = grads
        f = _Factors.of(g, ctx.group, ctx.read_first)

        # From chunk to chunk, the last one first: gradients of U, of S' and of what S' + K'ᵀ U becomes.
        d_u, d_scaled = local.mT @ d_read, q.mT @ d_read
        afters, written = [], []
        weights = [(d_state * end).sum((-1, -2))]  # <S, its gradient>, at every boundary
        for c in reversed(range(len(k))):
            afters.append(f.half[c] * d_state)
            d_before = d_scaled[c] + afters[-1]
            if stale is not None:
                written.append(torch.baddbmm(d_u[c], k_write[c], afters[-1]))
                d_before = torch.baddbmm(d_before, stale[c].mT, written[-1], alpha=-1)
            weights.append((d_before * before[c]).sum((-1, -2)))
            d_state = f.half[c] * d_before
        d_after, weight = torch.stack(afters[::-1]), torch.stack(weights[::-1])
        d_u = torch.stack(written[::-1]) if written else d_u + k_write @ d_after

        d_local = _lower(d_read @ u.mT, ctx.group, -1 if ctx.read_first else 0)
        d_q = d_local @ k_write + d_read @ before.mT
        d_write = d_local.mT @ q + u @ d_after.mT
        d_sums = _inner(d_q, q, ctx.group)
        d_g = -d_sums if ctx.read_first else torch.zeros_like(g)
        d_half = weight[:-1] + weight[1:] - d_sums.sum(-1)
        d_k, d_eta, d_fresh = torch.zeros_like(k), torch.zeros_like(eta), d_u
        if inverse is not None:
            d_fresh, d_correct = inverse.mT @ d_u, -(inverse.mT @ (d_u @ before.mT))
            d_lower = -(d_fresh @ fresh.mT + d_correct @ stale.mT).tril(-1)
            d_write += d_lower.mT @ k_correct
            d_correct += d_lower @ k_write
            d_k += d_correct * (eta.unsqueeze(-1) * f.correct)
            share = _inner(d_correct, k_correct)
            d_sums, d_g, d_half = d_sums + share, d_g - share, d_half - share.sum(-1)
            d_eta += _inner(d_correct, k) * f.correct.squeeze(-1)
        share = _inner(d_write, k_write)
        d_sums, d_half = d_sums - share, d_half + share.sum(-1)
        d_sums[..., -1] += d_half / 2
        d_g += d_sums.flip(-1).cumsum(-1).flip(-1)
        d_eta += _inner(d_fresh, v)
        return d_q * f.read, d_k + d_write * f.write, d_fresh * eta.unsqueeze(-1), d_g, d_eta, d_state, None, None


def _lower(x: Tensor, group: int, diagonal: int) -> Tensor:
    """(chunks, n, group · size, size) up to the diagonal of each query head's square."""
    if group == 1:
        return x.tril_(diagonal)
    return x.unflatten(2, (group, -1)).tril(diagonal).flatten(2, 3)


def _inner(x: Tensor, y: Tensor, group: int = 1) -> Tensor:
    """Inner products of rows, (chunks, n, size), added up over a group."""
    products = (x * y).sum(-1)
    return products if group == 1 else products.unflatten(2, (group, -1)).sum(2)
