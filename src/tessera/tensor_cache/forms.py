"""Which form of the recurrence of recurrence.py computes many tokens: the fastest that can."""

from __future__ import annotations

from torch import Tensor

from tessera.kernels import cpu
from tessera.kernels.cpu import absorb as cpu_absorb
from tessera.kernels.dispatch import chosen, say_once
from tessera.tensor_cache.config import Order, Rule
from tessera.tensor_cache.fused import fused_scan
from tessera.tensor_cache.fused import refusal as fused_refusal
from tessera.tensor_cache.recurrence import wedge
from tessera.tensor_cache.scan import scan


def recur(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    eta: Tensor,
    state: Tensor,
    rule: Rule,
    order: Order = "write_first",
    chunk: int = 64,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`tessera.tensor_cache.recurrence.loop`, of any number of tokens; shapes as there.

    Args:
        q, k, v, g, eta, state, rule, order: as there.
        chunk: of `tessera.tensor_cache.scan.scan`, which runs where no kernel can.
        backend: see `tessera.kernels.dispatch.attend`. "cpu" is the kernel in C++, "triton" flash-linear-attention's where they
            fit, "reference" the scan.

    Raises:
        ValueError: if the kernel in C++ is asked for and cannot do it, saying why.
    """
    if rule == "wedge":
        return wedge(recur, q, k, v, g, eta, state, order, chunk, backend)
    name = chosen(backend)
    family, _, level = name.partition(":")
    if family in ("auto", "triton") and fused_refusal(q, v, rule, order) is None:
        return fused_scan(q, k, v, g, eta, state, rule)
    if family in ("auto", "cpu"):
        why = cpu_absorb.refusal(q, k, v, g, eta, state)
        if why is None:
            return cpu_absorb.absorb(q, k, v, g, eta, state, rule == "delta", order == "read_first", level or None)
        if family == "cpu":
            raise ValueError(f"backend {name!r} cannot run: {why}")
        if q.device.type == "cpu" and cpu.MISSING is not None:
            say_once("the recurrence of a Tensor Cache", cpu.MISSING)
    return scan(q, k, v, g, eta, state, rule, order, chunk)
