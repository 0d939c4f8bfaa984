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

import torch
from torch import Tensor

from tessera.associative.config import Order, Rule


def loop(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, eta: Tensor, state: Tensor, rule: Rule, order: Order = "write_first"
) -> tuple[Tensor, Tensor]:
    """Token by token, the definition. Returns the reads (batch, heads, group, tokens, d_v) and the state at the end."""
    reads = []
    for i in range(q.shape[3]):
        if order == "read_first":
            reads.append(q[:, :, :, i] @ state)
        state = write(state, k[:, :, i], v[:, :, i], g[:, :, i], eta[:, :, i], rule)
        if order == "write_first":
            reads.append(q[:, :, :, i] @ state)
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
    below = torch.ones(size, size, dtype=torch.bool, device=q.device).tril(0 if order == "write_first" else -1)
    # The difference first, so that nothing overflows above the diagonal.
    mask = (seen[..., :, None] - total[..., None, :]).masked_fill(~below, -torch.inf).exp()
    scores = (q @ k.unsqueeze(2).transpose(-1, -2)) * mask.unsqueeze(2)
    remaining = (last - total).exp().unsqueeze(-1)  # of a write, at the chunk's end
    reach = seen.exp()[:, :, None, :, :, None] * q  # reads of what was there before the chunk
    end = last.exp().unsqueeze(-1)
    if rule == "delta":
        return _scan_delta(scores, reach, remaining, end, k, v, g, eta, total, state, tokens)
    rate = eta.unsqueeze(-1)
    local = scores @ (rate * v).unsqueeze(2)
    added = (remaining * k).transpose(-1, -2) @ (rate * v)
    if rule == "wedge":
        crossed = (q @ v.unsqueeze(2).transpose(-1, -2)) * mask.unsqueeze(2)
        local = local - crossed @ (rate * k).unsqueeze(2)
        added = added - added.transpose(-1, -2)
    states = []
    for c in range(count):
        states.append(state)
        state = end[:, :, c] * state + added[:, :, c]
    before = torch.stack(states, dim=2).unsqueeze(2)  # (batch, heads, 1, chunks, d_k, d_v)
    return (local + reach @ before).flatten(3, 4)[:, :, :, :tokens], state


def _scan_delta(
    scores: Tensor,
    reach: Tensor,
    remaining: Tensor,
    end: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    eta: Tensor,
    total: Tensor,
    state: Tensor,
    tokens: int,
) -> tuple[Tensor, Tensor]:
    size = k.shape[3]
    beta = (eta * (-g).exp()).unsqueeze(-1)
    strictly = torch.ones(size, size, dtype=torch.bool, device=k.device).tril(-1)
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~strictly, -torch.inf).exp()
    lower = beta * decay * (k @ k.transpose(-1, -2))
    sides = torch.cat((eta.unsqueeze(-1) * v, beta * total.exp().unsqueeze(-1) * k), dim=-1)
    # The diagonal of ones is understood.
    solved = torch.linalg.solve_triangular(lower, sides, upper=False, unitriangular=True)
    fresh, stale = solved.split((v.shape[-1], k.shape[-1]), dim=-1)
    kept = (remaining * k).transpose(-1, -2)
    states, written = [], []
    for c in range(k.shape[2]):
        states.append(state)
        u = fresh[:, :, c] - stale[:, :, c] @ state
        written.append(u)
        state = end[:, :, c] * state + kept[:, :, c] @ u
    before = torch.stack(states, dim=2).unsqueeze(2)
    u = torch.stack(written, dim=2).unsqueeze(2)
    return (scores @ u + reach @ before).flatten(3, 4)[:, :, :, :tokens], state
