"""The recurrence of recurrence.py for C tokens at once, forward and backward.

With G the running sum of g within a chunk, M_ij = exp(G_i - G_j) for j <= i, and S the matrix before the chunk:

    outer   U = diag(η) V
    delta   (1 + L) U = diag(η) V - diag(exp(G)) B S,   B = diag(β) K,   L = (B Kᵀ) ∘ M below the diagonal,   β = η / λ
    both    R = exp(G) Q S + P U,   P = (Q Kᵀ) ∘ M;    S becomes exp(G_C) S + (exp(G_C - G) K)ᵀ U

(the UT form of a gated delta rule: arXiv 2406.06484, 2412.06464). With T = (1 + L)⁻¹, U = Y - W S for Y = T diag(η) V and
W = T diag(exp(G)) B. What does not depend on S is computed for all chunks at once; only the products with S go from chunk to
chunk, in the backward pass those with its gradient. Everything is in float32: a decay of 0.999 is 1 in bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from tessera.associative.config import Order, Rule


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
) -> tuple[Tensor, Tensor]:
    """`tessera.associative.recurrence.loop`, `chunk` tokens at a time. Any number of tokens; shapes as there."""
    batch, heads, group, tokens, _ = q.shape
    if tokens == 0:
        return q.new_zeros((*q.shape[:4], v.shape[-1])), state
    if rule == "wedge":
        # Linear in what is written: k ⊗ v is written to one matrix, -v ⊗ k to another, and both are read.
        reads, ends = zip(
            scan(q, k, v, g, eta, state, "outer", order, chunk),
            scan(q, v, -k, g, eta, torch.zeros_like(state), "outer", order, chunk),
            strict=True,
        )
        return reads[0] + reads[1], ends[0] + ends[1]
    size = min(chunk, tokens)
    # Tokens that decay nothing and write nothing.
    rest = -tokens % size
    q, k, v = (pad(x, (0, 0, 0, rest)) for x in (q, k, v))
    g, eta = (pad(x, (0, rest)) for x in (g, eta))
    # The query heads of a group become rows of their chunk, (batch · heads, chunks, group · size, d_k).
    q = q.flatten(0, 1).unflatten(2, (-1, size)).transpose(1, 2).flatten(2, 3)
    k, v, g, eta = (x.flatten(0, 1).unflatten(1, (-1, size)) for x in (k, v, g, eta))
    read, end = _Scan.apply(q, k, v, g, eta, state.flatten(0, 1), rule == "delta", order == "read_first")
    read = read.unflatten(2, (group, size)).transpose(1, 2).flatten(2, 3).unflatten(0, (batch, heads))
    return read[:, :, :, :tokens], end.unflatten(0, (batch, heads))


class _Scan(torch.autograd.Function):
    """q: (n, chunks, group · size, d_k), k: (n, chunks, size, d_k), v: (n, chunks, size, d_v), g, eta: (n, chunks, size),
    state: (n, d_k, d_v); returns the reads (n, chunks, group · size, d_v) and the state at the end."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, eta: Tensor, state: Tensor, delta: bool, read_first: bool
    ) -> tuple[Tensor, Tensor]:
        group = q.shape[2] // k.shape[2]
        sums = g.cumsum(-1)
        grown, end = sums.exp().unsqueeze(-1), sums[..., -1:].exp().unsqueeze(-1)
        # The difference first, so that nothing overflows above the diagonal.
        decays = (sums[..., :, None] - sums[..., None, :]).masked_fill(_above(k.shape[2], k), -torch.inf).exp()
        if read_first:
            q = q * _rows((-g).exp().unsqueeze(-1), group)
        local = q @ k.mT * _rows(decays.tril(-1) if read_first else decays, group)
        reach = q * _rows(grown, group)
        kept = k * (sums[..., -1:] - sums).exp().unsqueeze(-1)
        new = eta.unsqueeze(-1) * v
        inverse = old = lower = None
        if delta:
            rated = (eta * (-g).exp()).unsqueeze(-1) * k
            lower = (rated @ k.mT * decays).tril(-1)
            inverse = _unit_inverse(lower)
            old, new = inverse @ (grown * rated), inverse @ new
        befores, written = [], []
        turned = kept.mT
        for c in range(k.shape[1]):
            befores.append(state)
            u = new[:, c]
            if old is not None:
                u = torch.baddbmm(u, old[:, c], state, alpha=-1)
                written.append(u)
            state = torch.baddbmm(end[:, c] * state, turned[:, c], u)
        before, u = torch.stack(befores, dim=1), torch.stack(written, dim=1) if written else new
        ctx.save_for_backward(q, k, v, g, eta, decays, local, kept, before, u, new, inverse, old, lower)
        ctx.read_first = read_first
        return local @ u + reach @ before, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, eta, decays, local, kept, before, u, new, inverse, old, lower = ctx.saved_tensors
        d_read, d_state = grads
        group = q.shape[2] // k.shape[2]
        sums = g.cumsum(-1)
        grown, end = sums.exp().unsqueeze(-1), sums[..., -1:].exp().unsqueeze(-1)
        reach = q * _rows(grown, group)

        # From chunk to chunk, the last one first.
        d_u, d_before = local.mT @ d_read, reach.mT @ d_read
        afters, written = [d_state], []
        for c in reversed(range(k.shape[1])):
            d_state = torch.addcmul(d_before[:, c], end[:, c], d_state)
            if old is not None:
                written.append(torch.baddbmm(d_u[:, c], kept[:, c], afters[-1]))
                d_state = torch.baddbmm(d_state, old[:, c].mT, written[-1], alpha=-1)
            afters.append(d_state)
        d_after = torch.stack(afters[-2::-1], dim=1)
        d_u = torch.stack(written[::-1], dim=1) if written else d_u + kept @ d_after

        # Reads: of what was there before, and of the chunk's own writes.
        d_reach = d_read @ before.mT
        d_local = d_read @ u.mT
        d_sums = _summed((d_reach * reach).sum(-1), group)
        changed = d_local * local
        d_sums += _summed(changed.sum(-1), group) - changed.sum(-2)
        d_local *= _rows(decays.tril(-1) if ctx.read_first else decays, group)
        d_q = d_local @ k + d_reach * _rows(grown, group)
        d_k = d_local.mT @ q

        # What is left of the chunk's writes at its end, and of what was there before.
        d_kept = u @ d_after.mT
        d_k += d_kept * (sums[..., -1:] - sums).exp().unsqueeze(-1)
        lost = (d_kept * kept).sum(-1)
        d_sums -= lost
        d_sums[..., -1] += lost.sum(-1) + (before * d_after).sum((-1, -2)) * end[..., 0, 0]

        # What is written.
        d_g = torch.zeros_like(g)
        d_new = d_u
        if inverse is not None:
            shrunk = (-g).exp()
            beta = (eta * shrunk).unsqueeze(-1)
            d_new = inverse.mT @ d_u
            d_old = inverse.mT @ (d_u @ before.mT).neg_()
            d_lower = -(d_new @ new.mT + d_old @ old.mT)
            changed = d_lower * lower
            d_sums += changed.sum(-1) - changed.sum(-2)
            d_sums += (d_old * k).sum(-1) * (beta * grown).squeeze(-1)
            d_lower = (d_lower * decays).tril(-1)
            d_rated = d_lower @ k + d_old * grown
            d_k += d_lower.mT @ (beta * k) + beta * d_rated
            d_beta = (d_rated * k).sum(-1)
            d_eta = d_beta * shrunk
            d_g -= d_beta * beta.squeeze(-1)
        else:
            d_eta = torch.zeros_like(eta)
        d_eta = d_eta + (d_new * v).sum(-1)
        d_v = d_new * eta.unsqueeze(-1)
        if ctx.read_first:
            d_g -= _summed((d_q * q).sum(-1), group)
            d_q = d_q * _rows((-g).exp().unsqueeze(-1), group)
        d_g += d_sums.flip(-1).cumsum(-1).flip(-1)
        return d_q, d_k, d_v, d_g, d_eta, d_state, None, None


def _above(size: int, like: Tensor) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=like.device).triu(1)


def _rows(x: Tensor, group: int) -> Tensor:
    """(n, chunks, size, ...) for every query head of a group: (n, chunks, group · size, ...)."""
    return x if group == 1 else x.repeat(1, 1, group, *[1] * (x.ndim - 3))


def _summed(x: Tensor, group: int) -> Tensor:
    """(n, chunks, group · size) added up over the group."""
    return x if group == 1 else x.unflatten(2, (group, -1)).sum(2)


def _unit_inverse(lower: Tensor) -> Tensor:
    """(1 + L)⁻¹ for strictly lower triangular L (..., n, n).

    By halves: [[A, 0], [B, D]]⁻¹ = [[A⁻¹, 0], [-D⁻¹ B A⁻¹, D⁻¹]], from blocks of 8 upwards.
    """
    n = lower.shape[-1]
    whole = 1 << max(3, (n - 1).bit_length())
    lower = pad(lower, (0, whole - n, 0, whole - n))

    def blocks(size: int) -> Tensor:
        cut = lower.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))  # (..., rows, size, columns, size)
        return cut.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)

    one = torch.eye(8, dtype=lower.dtype, device=lower.device)
    x = blocks(8)
    square = x @ x
    # L⁸ = 0, so this is the whole series.
    inverse = (one - x) @ (one + square) @ (one + square @ square)
    size = 8
    while size < whole:
        below = blocks(2 * size)[..., size:, :size]
        top, bottom = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        left = torch.cat((top, -(bottom @ below @ top)), dim=-2)
        right = torch.cat((torch.zeros_like(bottom), bottom), dim=-2)
        inverse, size = torch.cat((left, right), dim=-1), 2 * size
    return inverse.squeeze(-3)[..., :n, :n]
