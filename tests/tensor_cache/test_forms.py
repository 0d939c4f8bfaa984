"""The recurrence in C++ agrees with the token loop, and the right form runs."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tessera.kernels import cpu, dispatch
from tessera.tensor_cache import TensorCache, TensorCacheConfig, forms
from tessera.tensor_cache.forms import recur
from tessera.tensor_cache.recurrence import loop
from tessera.tensor_cache.tensor_cache_config import Order, Rule

built = pytest.mark.skipif(cpu.MISSING is not None, reason=str(cpu.MISSING))
SHAPES = [
    (1, 2, 1, 70, 64, 64),
    (2, 3, 2, 33, 16, 16),
    (1, 1, 3, 40, 7, 5),
    (1, 2, 1, 65, 40, 100),
    (1, 1, 1, 1, 64, 64),
    (2, 1, 2, 50, 130, 20),
]


def inputs(batch: int, heads: int, group: int, tokens: int, d_k: int, d_v: int) -> list[Tensor]:
    k = normalize(torch.randn(batch, heads, tokens, d_k), dim=-1)
    x = [torch.randn(batch, heads, group, tokens, d_k), k, torch.randn(batch, heads, tokens, d_v)]
    x += [-0.2 * torch.rand(batch, heads, tokens), torch.rand(batch, heads, tokens), torch.randn(batch, heads, d_k, d_v)]
    return [t.requires_grad_() for t in x]


@built
@pytest.mark.parametrize("level", cpu.levels())
@pytest.mark.parametrize("order", ["write_first", "read_first"])
@pytest.mark.parametrize("rule", ["outer", "delta", "wedge"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_is_the_loop_forward_and_backward(shape: tuple[int, ...], rule: Rule, order: Order, level: str) -> None:
    if rule == "wedge":
        shape = (*shape[:5], shape[4])
    x = inputs(*shape)
    results = []
    drawn = torch.get_rng_state()
    for found in (recur(*x, rule, order, backend=f"cpu:{level}"), loop(*x, rule, order)):
        torch.set_rng_state(drawn)
        loss = sum((y * torch.randn_like(y)).sum() for y in found)
        results.append((*found, *torch.autograd.grad(loss, x)))  # type: ignore[arg-type]
    for fast, slow in zip(*results, strict=True):
        assert (fast - slow).norm() <= 1e-4 * slow.norm()


@built
@pytest.mark.parametrize("cut", [0, 1, 32, 77])
def test_a_stream_may_be_cut_anywhere(cut: int) -> None:
    q, k, v, g, eta, state = inputs(2, 2, 2, 77, 16, 16)
    whole, end = recur(q, k, v, g, eta, state, "delta", backend="cpu")
    parts, kept = [], state
    for part in (slice(0, cut), slice(cut, None)):
        here = (q[:, :, :, part], k[:, :, part], v[:, :, part], g[:, :, part], eta[:, :, part])
        read, kept = recur(*here, kept, "delta", backend="cpu")
        parts.append(read)
    torch.testing.assert_close(torch.cat(parts, 3), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kept, end, rtol=1e-5, atol=1e-5)


@built
@pytest.mark.parametrize("rule", ["outer", "delta"])
@pytest.mark.parametrize("g", [-1.0, -30.0, -float("inf")])
def test_strong_decays_are_those_of_the_loop(g: float, rule: Rule) -> None:
    q, k, v, _, eta, state = (t.detach() for t in inputs(1, 2, 1, 150, 8, 8))
    decays = torch.where(torch.rand(eta.shape) < 0.5, g, -0.01)
    eta = eta * decays.exp()  # at most the decay, where the delta rule is stable
    for fast, slow in zip(
        recur(q, k, v, decays, eta, state, rule, backend="cpu"), loop(q, k, v, decays, eta, state, rule), strict=True
    ):
        assert fast.isfinite().all()
        assert (fast - slow).norm() <= 1e-5 * slow.norm()


@built
def test_a_memory_runs_the_kernel_and_by_wish_the_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for module, name in ((forms.cpu_absorb, "absorb"), (forms.scan, "scan")):
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, kernel=kernel: ran.append(name) or kernel(*a))
    memory = TensorCache(TensorCacheConfig(window=4, sink=0), 2, 16)
    q, k, v = torch.randn(3, 1, 2, 20, 16)
    fast, _ = memory(q, k, v)
    monkeypatch.setenv("TESSERA_BACKEND", "reference")
    slow, _ = memory(q, k, v)
    assert ran == ["absorb", "scan"]
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)


def test_without_kernels_the_scan_runs_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(1, 2, 1, 20, 8, 8)
    monkeypatch.setattr(cpu, "MISSING", "no compiler was there")
    dispatch.say_once.cache_clear()
    with pytest.warns(UserWarning, match="Tensor Cache runs in plain PyTorch, which is slow: no compiler was there"):
        found = recur(*x, "delta")
    torch.testing.assert_close(found, loop(*x, "delta"), rtol=1e-4, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recur(*x, "delta")
    dispatch.say_once.cache_clear()


@built
def test_without_a_graph_nothing_is_kept_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    x, kept = inputs(1, 2, 1, 40, 8, 8), []
    kernel = forms.cpu_absorb._cpu.absorb

    def note(level: str, shape: list[int], given: list[int], segments: int, *rest: Any) -> None:
        kept.append(segments != 0)
        kernel(level, shape, given, segments, *rest)

    monkeypatch.setattr(forms.cpu_absorb._cpu, "absorb", note)
    recur(*x, "delta", backend="cpu")
    with torch.no_grad():
        recur(*x, "delta", backend="cpu")
    assert kept == [True, False]


def test_what_the_kernel_cannot_do_the_scan_does_or_an_error_says_why() -> None:
    x = [t.detach().double() for t in inputs(1, 1, 1, 10, 4, 4)]
    torch.testing.assert_close(recur(*x, "delta"), loop(*x, "delta"), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="cannot run"):
        recur(*x, "delta", backend="cpu")


@built
@pytest.mark.parametrize(("place", "name"), [(1, "k"), (2, "v"), (3, "g"), (4, "eta"), (5, "state")])
def test_shapes_that_do_not_fit_are_refused(place: int, name: str) -> None:
    x = [t.detach() for t in inputs(2, 2, 1, 9, 8, 8)]
    x[place] = x[place][:1]
    with pytest.raises(ValueError, match=f"{name} .* does not fit queries"):
        recur(*x, "delta", backend="cpu")


@built
def test_what_is_not_asked_for_needs_no_gradient() -> None:
    x = [t.detach() for t in inputs(1, 2, 1, 40, 8, 8)]
    with torch.inference_mode():
        state = x[5] + 1
    rate = x[4].clone().requires_grad_()
    results = []
    for form in (recur, loop):
        read, _ = form(*x[:4], rate, state.clone() if form is loop else state, "delta")
        results.append(torch.autograd.grad(read.sum(), rate)[0])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
