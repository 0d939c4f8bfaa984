"""The chunk-parallel forms agree with the token loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tessera.tensor_cache.recurrence import loop
from tessera.tensor_cache.scan import scan

RULES = ("outer", "delta", "wedge")
ORDERS = ("write_first", "read_first")


def inputs(tokens: int, rule: str, group: int = 2, d_k: int = 8, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    d_v = d_k if rule == "wedge" else 5
    q = torch.randn(2, 3, group, tokens, d_k, dtype=dtype)
    k = torch.nn.functional.normalize(torch.randn(2, 3, tokens, d_k, dtype=dtype), dim=-1)
    v = torch.randn(2, 3, tokens, d_v, dtype=dtype)
    g = -torch.rand(2, 3, tokens, dtype=dtype) * 0.1
    eta = torch.rand(2, 3, tokens, dtype=dtype) * 0.8
    state = torch.randn(2, 3, d_k, d_v, dtype=dtype)
    return [q, k, v, g, eta, state]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("tokens", "chunk"), [(1, 64), (64, 16), (65, 16), (37, 64), (100, 1), (130, 64)])
def test_the_scan_is_the_loop(rule: str, order: str, tokens: int, chunk: int) -> None:
    x = inputs(tokens, rule)
    torch.testing.assert_close(scan(*x, rule, order, chunk), loop(*x, rule, order), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_the_scan_are_those_of_the_loop(rule: str, order: str) -> None:
    x = [t.requires_grad_() for t in inputs(50, rule)]
    grads = []
    drawn = torch.get_rng_state()
    for form in (lambda: scan(*x, rule, order, 16), lambda: loop(*x, rule, order)):
        torch.set_rng_state(drawn)
        reads, state = form()
        loss = (reads * torch.randn_like(reads)).sum() + (state * torch.randn_like(state)).sum()
        grads.append(torch.autograd.grad(loss, x))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rule", RULES)
def test_float32_is_equal_to_rounding(rule: str) -> None:
    x = inputs(1024, rule, d_k=32, dtype=torch.float32)
    (fast, fast_state), (slow, slow_state) = scan(*x, rule), loop(*x, rule)
    assert (fast - slow).norm() / slow.norm() < 5e-6
    assert (fast_state - slow_state).norm() / slow_state.norm() < 5e-6


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cut", [0, 1, 40, 77])
def test_a_stream_may_be_cut_anywhere(rule: str, cut: int) -> None:
    q, k, v, g, eta, state = inputs(77, rule)
    whole, end = scan(q, k, v, g, eta, state, rule, chunk=16)
    first, middle = scan(q[:, :, :, :cut], k[:, :, :cut], v[:, :, :cut], g[:, :, :cut], eta[:, :, :cut], state, rule, chunk=16)
    second, last = scan(q[:, :, :, cut:], k[:, :, cut:], v[:, :, cut:], g[:, :, cut:], eta[:, :, cut:], middle, rule, chunk=16)
    torch.testing.assert_close(torch.cat((first, second), 3), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(last, end, rtol=1e-10, atol=1e-10)


def test_aligned_keys_at_a_high_rate_stay_bounded() -> None:
    # With the same key repeated, corrections from the chunk's start alone would diverge.
    k = torch.ones(1, 1, 4096, 16) / 4
    v, q = torch.randn(1, 1, 4096, 16), torch.randn(1, 1, 1, 4096, 16)
    g, eta = torch.full((1, 1, 4096), -1e-3), torch.full((1, 1, 4096), 0.99)
    reads, state = scan(q, k, v, g, eta, torch.zeros(1, 1, 16, 16), "delta")
    assert reads.abs().max() < 100
    assert state.isfinite().all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rule", ["outer", "delta"])
@pytest.mark.parametrize("g", [-1.0, -30.0, -200.0])
def test_strong_decays_are_those_of_the_loop(g: float, rule: str, order: str) -> None:
    q, k, v, _, eta, state = inputs(150, rule, dtype=torch.float32)
    decays = torch.where(torch.rand(eta.shape) < 0.5, g, -0.01)
    eta = eta * decays.exp()  # at most the decay, where the delta rule is stable
    x = [t.requires_grad_() for t in (q, k, v, decays, eta, state)]
    results = []
    for form in (scan, loop):
        reads, end = form(*x, rule, order)
        grads = torch.autograd.grad(reads.square().sum() + end.square().sum(), x)
        # A decay of e^-40 or less leaves nothing.
        results.append((reads, end, *grads[:3], grads[3] * (decays > -40), *grads[4:]))
    for fast, slow in zip(*results, strict=True):
        assert fast.isfinite().all()
        # Where everything has decayed, a gradient may be zero in one form and almost zero in the other.
        assert (fast - slow).norm() <= 1e-4 * slow.norm() + 1e-12
