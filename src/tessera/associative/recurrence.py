"""The recurrence that a Tensor Cache is, token by token and chunk by chunk.

For a stream of queries q_i, pairs (k_i, v_i), decays λ_i = exp(g_i) and write rates η_i, one matrix A per head:

    outer   A_i = λ_i A_{i-1} + η_i k_i ⊗ v_i
    delta   A_i = λ_i A_{i-1} + η_i k_i ⊗ (v_i - k_i A_{i-1})
    wedge   A_i = λ_i A_{i-1} + η_i (k_i ⊗ v_i - v_i ⊗ k_i)
    read    r_i = q_i A_i, or q_i A_{i-1} with "read_first"

`loop` is the definition. `scan` computes the same for C tokens at once: with G the running sum of g within a chunk and
M_ij = exp(G_i - G_j) for j <= i,

    outer   R = exp(G) Q A_0 + ((Q Kᵀ) ∘ M) diag(η) V
    delta   (1 + L) U = diag(η) V - diag(β exp(G)) K A_0,   L_ij = β_i M_ij k_i·k_j for j < i,   β = η / λ
            R = exp(G) Q A_0 + ((Q Kᵀ) ∘ M) U

(the UT form of a gated delta rule: arXiv 2406.06484, 2412.06464). What does not depend on A_0 is computed for all chunks at
once; only the product with A_0 goes from chunk to chunk. Everything is in float32: a decay of 0.999 is 1 in bfloat16.

Shapes: q (batch, heads, group, tokens, d_k): `group` query heads share a key head; k (batch, heads, tokens, d_k);
v (batch, heads, tokens, d_v); g, eta (batch, heads, tokens); A (batch, heads, d_k, d_v).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tessera.associative.config import Order, Rule

#: Largest exponent that a factor of a decay may have.
_SAFE = 40.0


def loop(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, eta: Tensor, state: Tensor, rule: Rule, order: Order = "write_first"
) -> tuple[Tensor, Tensor]:
    """Token by token, the definition. Returns the reads (batch, heads, group, tokens, d_v) and the state at the end."""
    reads = []
    for q_i, k_i, v_i, g_i, eta_i in zip(q.unbind(3), k.unbind(2), v.unbind(2), g.unbind(2), eta.unbind(2), strict=True):
        if order == "read_first":
            reads.append(q_i @ state)
        state = write(state, k_i, v_i, g_i, eta_i, rule)
        if order == "write_first":
            reads.append(q_i @ state)
    empty = q.new_zeros((*q.shape[:4], v.shape[-1]))
    return (torch.stack(reads, dim=3) if reads else empty), state


def write(state: Tensor, k: Tensor, v: Tensor, g: Tensor, eta: Tensor, rule: Rule) -> Tensor:
    """One write. k: (batch, heads, d_k), v: (batch, heads, d_v), g, eta: (batch, heads)."""
    kept = state * g.exp()[..., None, None]
    rate = eta[..., None, None]
    if rule == "delta":
        v = v - (k.unsqueeze(-2) @ state).squeeze(-2)
    pair = k.unsqueeze(-1) * v.unsqueeze(-2)
    return kept + rate * (pair - pair.transpose(-1, -2) if rule == "wedge" else pair)


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
    """`loop`, `chunk` tokens at a time. Any number of tokens."""
    tokens = q.shape[3]
    if tokens == 0:
        return q.new_zeros((*q.shape[:4], v.shape[-1])), state
    size = min(chunk, tokens)
    pad = -tokens % size
    if pad:
        # Tokens that decay nothing and write nothing.
        q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
        g, eta = (torch.nn.functional.pad(x, (0, pad)) for x in (g, eta))
    count = (tokens + pad) // size
    q = q.unflatten(3, (count, size))  # (batch, heads, group, chunks, size, d_k)
    k, v, g, eta = (x.unflatten(2, (count, size)) for x in (k, v, g, eta))
    total = g.cumsum(-1)
    seen = total if order == "write_first" else total - g
    last = total[..., -1:]
    diagonal = 0 if order == "write_first" else -1
    weigh = _decays(seen, total, diagonal)
    remaining = (last - total).exp().unsqueeze(-1)  # of a write, at the chunk's end
    reach = seen.exp()[:, :, None, :, :, None] * q  # reads of what was there before the chunk
    kept = (remaining * k).transpose(-1, -2)
    end = last.exp().unsqueeze(-1)
    rate = eta.unsqueeze(-1)
    states = []
    if rule == "delta":
        beta = (eta * (-g).exp()).unsqueeze(-1)
        inverse = _UnitInverse.apply(_decays(total, total, -1)(beta * k, k))
        fresh, stale = inverse @ (rate * v), inverse @ (beta * total.exp().unsqueeze(-1) * k)
        written = []
        # Unbound, for the gradient of an index is as large as what is indexed.
        for new, old, keep, keys in zip(fresh.unbind(2), stale.unbind(2), end.unbind(2), kept.unbind(2), strict=True):
            states.append(state)
            u = new - old @ state
            written.append(u)
            state = keep * state + keys @ u
        local = weigh(q, k.unsqueeze(2)) @ torch.stack(written, dim=2).unsqueeze(2)
    else:
        local = weigh(q, k.unsqueeze(2)) @ (rate * v).unsqueeze(2)
        added = kept @ (rate * v)
        if rule == "wedge":
            local = local - weigh(q, v.unsqueeze(2)) @ (rate * k).unsqueeze(2)
            added = added - added.transpose(-1, -2)
        for keep, new in zip(end.unbind(2), added.unbind(2), strict=True):
            states.append(state)
            state = keep * state + new
    before = torch.stack(states, dim=2).unsqueeze(2)  # (batch, heads, 1, chunks, d_k, d_v)
    return (local + reach @ before).flatten(3, 4)[:, :, :, :tokens], state


def _decays(rows: Tensor, columns: Tensor, diagonal: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of x and y: (x yᵀ) ∘ exp(rows_i - columns_j) up to the diagonal, and zero above it.

    rows, columns: (batch, heads, chunks, size), the decays summed up; x and y may have a dimension of groups before chunks.
    """
    size = rows.shape[-1]
    if rows.device.type == "cpu" and float(columns.detach().amin()) > -2 * _SAFE:
        # The two factors of the decay, each from the middle of what there is, are within the range of float32.
        middle = (columns.amin(-1, keepdim=True) / 2).detach()
        left, right = (rows - middle).exp().unsqueeze(-1), (middle - columns).exp().unsqueeze(-1)

        def apart(x: Tensor, y: Tensor) -> Tensor:
            a, b = (left.unsqueeze(2), right.unsqueeze(2)) if x.ndim == 6 else (left, right)
            return ((x * a) @ (y * b).transpose(-1, -2)).tril(diagonal)

        return apart
    below = torch.ones(size, size, dtype=torch.bool, device=rows.device).tril(diagonal)
    # The difference first, so that nothing overflows above the diagonal.
    mask = (rows[..., :, None] - columns[..., None, :]).masked_fill(~below, -torch.inf).exp()

    def together(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.transpose(-1, -2)) * (mask.unsqueeze(2) if x.ndim == 6 else mask)

    return together


class _UnitInverse(torch.autograd.Function):
    """(1 + L)⁻¹ for strictly lower triangular L (..., n, n), by halves; its gradient is two products."""

    @staticmethod
    def forward(ctx: Any, lower: Tensor) -> Tensor:
        n = lower.shape[-1]
        size = 1 << max(3, (n - 1).bit_length())
        inverse = _unit_inverse(torch.nn.functional.pad(lower, (0, size - n, 0, size - n)))[..., :n, :n]
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        turned = inverse.transpose(-1, -2)
        return -(turned @ grads[0] @ turned).tril(-1)


def _unit_inverse(lower: Tensor) -> Tensor:
    """n a power of two, at least 8. [[A, 0], [B, D]]⁻¹ = [[A⁻¹, 0], [-D⁻¹ B A⁻¹, D⁻¹]], from blocks of 8 upwards."""

    def blocks(size: int) -> Tensor:
        cut = lower.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))  # (..., rows, size, columns, size)
        return cut.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)

    one = torch.eye(8, dtype=lower.dtype, device=lower.device)
    x = blocks(8)
    square = x @ x
    # L⁸ = 0, so this is the whole series.
    inverse = (one - x) @ (one + square) @ (one + square @ square)
    size = 8
    while size < lower.shape[-1]:
        below = blocks(2 * size)[..., size:, :size]
        top, bottom = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        left = torch.cat((top, -(bottom @ below @ top)), dim=-2)
        right = torch.cat((torch.zeros_like(bottom), bottom), dim=-2)
        inverse, size = torch.cat((left, right), dim=-1), 2 * size
    return inverse.squeeze(-3)
