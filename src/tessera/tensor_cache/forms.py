"""The choice of the fastest implementation of the recurrence of recurrence.py for many tokens."""

from __future__ import annotations

import sys

from torch import Tensor

from tessera.kernels.cpu import absorb as cpu_absorb
from tessera.kernels.operations import Implementation, Operation
from tessera.tensor_cache import scan
from tessera.tensor_cache.fused import fused_scan
from tessera.tensor_cache.fused import refusal as fused_refusal
from tessera.tensor_cache.recurrence import wedge
from tessera.tensor_cache.tensor_cache_config import Order, Rule


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
    least: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `tessera.tensor_cache.recurrence.loop` for any number of tokens; shapes as there.

    Args:
        q, k, v, g, eta, state, rule, order: as there.
        chunk: tokens of a chunk of `tessera.tensor_cache.scan.scan`, which runs where no kernel can.
        backend: see `tessera.kernels.dispatch.attend`. "cpu" is the kernel in C++, "triton" flash-linear-attention's where they
            fit, "reference" the scan.
        least: see `tessera.tensor_cache.scan.scan`.

    Raises:
        ValueError: if the kernel in C++ is asked for and cannot do it, saying why.
    """
    if rule == "wedge":
        return wedge(recur, q, k, v, g, eta, state, order, chunk, backend, least)
    found: tuple[Tensor, Tensor] = RECUR(q, k, v, g, eta, state, rule, order, chunk, least, backend=backend)
    return found


def _absorb(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    eta: Tensor,
    state: Tensor,
    rule: Rule,
    order: Order,
    *_: object,
    level: str | None = None,
) -> tuple[Tensor, Tensor]:
    return cpu_absorb.absorb(q, k, v, g, eta, state, rule == "delta", order == "read_first", level)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, eta: Tensor, state: Tensor, rule: Rule, *_: object
) -> tuple[Tensor, Tensor]:
    return fused_scan(q, k, v, g, eta, state, rule)


RECUR = Operation(
    "recur",
    "the recurrence of a Tensor Cache",
    Implementation("reference", scan, "scan"),
    [
        Implementation(
            "cpu",
            sys.modules[__name__],
            "_absorb",
            lambda q, k, v, g, eta, state, *_: cpu_absorb.refusal(q, k, v, g, eta, state),
            levels=True,
        ),
        Implementation(
            "triton",
            sys.modules[__name__],
            "_fused",
            lambda q, k, v, g, eta, state, rule, order, *_: fused_refusal(q, v, rule, order),
        ),
    ],
)
