"""The definition of a Tensor Cache's recurrence, token by token. `scan.py` computes the same in chunks.

For a stream of queries q_i, pairs (k_i, v_i), decays λ_i = exp(g_i) and write rates η_i, one matrix A per head:

    outer   A_i = λ_i A_{i-1} + η_i k_i ⊗ v_i
    delta   A_i = λ_i A_{i-1} + η_i k_i ⊗ (v_i - k_i A_{i-1})
    wedge   A_i = λ_i A_{i-1} + η_i (k_i ⊗ v_i - v_i ⊗ k_i)
    read    r_i = q_i A_i, or q_i A_{i-1} with "read_first"

Shapes: q (batch, heads, group, tokens, d_k): `group` query heads share a key head; k (batch, heads, tokens, d_k);
v (batch, heads, tokens, d_v); g, eta (batch, heads, tokens); A (batch, heads, d_k, d_v).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tessera.tensor_cache.tensor_cache_config import Order, Rule


def loop(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, eta: Tensor, state: Tensor, rule: Rule, order: Order = "write_first"
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence token by token. Returns the reads (batch, heads, group, tokens, d_v) and the state at the end."""
    reads = []
    for q_i, k_i, v_i, g_i, eta_i in zip(q.unbind(3), k.unbind(2), v.unbind(2), g.unbind(2), eta.unbind(2), strict=True):
        if order == "read_first":
            reads.append(q_i @ state)
        state = write(state, k_i, v_i, g_i, eta_i, rule)
        if order == "write_first":
            reads.append(q_i @ state)
    empty = q.new_zeros((*q.shape[:4], v.shape[-1]))
    return (torch.stack(reads, dim=3) if reads else empty), state


def wedge(
    form: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    eta: Tensor,
    state: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """Compute the wedge rule by an implementation of the outer one. `rest`: arguments of the implementation after the rule."""
    # The rule is linear in its writes: k ⊗ v is written to one matrix, -v ⊗ k to another, and both are read.
    there = form(q, k, v, g, eta, state, "outer", *rest)
    back = form(q, v, -k, g, eta, torch.zeros_like(state), "outer", *rest)
    return there[0] + back[0], there[1] + back[1]


def write(state: Tensor, k: Tensor, v: Tensor, g: Tensor, eta: Tensor, rule: Rule) -> Tensor:
    """Write one pair. k: (batch, heads, d_k), v: (batch, heads, d_v), g, eta: (batch, heads)."""
    kept = state * g.exp()[..., None, None]
    rate = eta[..., None, None]
    if rule == "delta":
        v = v - (k.unsqueeze(-2) @ state).squeeze(-2)
    pair = k.unsqueeze(-1) * v.unsqueeze(-2)
    return kept + rate * (pair - pair.transpose(-1, -2) if rule == "wedge" else pair)
