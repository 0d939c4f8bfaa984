"""The recurrence of recurrence.py on a GPU, by the kernels of flash-linear-attention (package fla-core, extra `gpu`).

Their gated delta rule corrects against the matrix after its decay, ours before it:

    theirs  A_i = λ A + β k ⊗ (v' - k λ A)        ours  A_i = λ A + η k ⊗ (v - k A)

which are the same for β = η / λ and v' = λ v. The outer rule is their simple gated linear attention of η v.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

from torch import Tensor

from tessera.tensor_cache.tensor_cache_config import Order, Rule

Kernel = Callable[..., tuple[Tensor, Tensor]]
#: Largest head_dim that the kernels take.
MAX_DIM = 256


@cache
def missing() -> str | None:
    """Say why there are no such kernels here, or return None."""
    try:
        import_module("fla.ops.gated_delta_rule")
        import_module("fla.ops.simple_gla")
    except Exception as error:
        return f"flash-linear-attention cannot be used ({error}); pip install 'tessera[gpu]'"
    return None


def refusal(q: Tensor, v: Tensor, rule: Rule, order: Order) -> str | None:
    """Say why `fused_scan` cannot be used, or return None if it can. q, v: as there."""
    if not q.is_cuda:
        return f"the queries are on {q.device}"
    if rule == "wedge" or order == "read_first":
        return f"there is no kernel for rule {rule!r} with order {order!r}"
    if not 16 <= min(q.shape[-1], v.shape[-1]) <= max(q.shape[-1], v.shape[-1]) <= MAX_DIM:
        return f"there is no kernel for heads of width {q.shape[-1]} and {v.shape[-1]}"
    return missing()


def fused_scan(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, eta: Tensor, state: Tensor, rule: Rule, kernel: Kernel | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `tessera.tensor_cache.recurrence.loop` for the outer and the delta rule; shapes as there.

    Args:
        q, k, v, g, eta, state, rule: as there; a token's write is read by its own query.
        kernel: `chunk_gated_delta_rule` or `chunk_simple_gla` of fla, or an equivalent; None: these.
    """
    _, heads, group, tokens, _ = q.shape
    if tokens == 0:
        return q.new_zeros((*q.shape[:4], v.shape[-1])), state
    arguments: dict[str, Any] = {}
    if rule == "delta":
        arguments["beta"] = eta * (-g).exp()
        v = v * g.exp().unsqueeze(-1)
        kernel = kernel or import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    else:
        v = v * eta.unsqueeze(-1)
        kernel = kernel or import_module("fla.ops.simple_gla").chunk_simple_gla
    arguments.update(k=k, v=v, g=g)
    # fla's kernels have no grouped queries, so each query head of a group gets a copy; and their tokens come before heads.
    shared = {name: x.repeat_interleave(group, 1).transpose(1, 2).contiguous() for name, x in arguments.items()}
    read, end = kernel(
        q=q.flatten(1, 2).transpose(1, 2).contiguous(),
        **shared,
        scale=1.0,
        initial_state=state.repeat_interleave(group, 1).contiguous(),
        output_final_state=True,
    )
    # All copies end in the same matrix.
    return read.transpose(1, 2).unflatten(1, (heads, group)), end.unflatten(1, (heads, group))[:, :, 0]
