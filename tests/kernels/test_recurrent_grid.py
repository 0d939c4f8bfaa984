"""Segments, the linear scan, and the C++ form of the grid's recurrence agree with an explicit loop over steps."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from tessera.kernels import cpu, dispatch
from tessera.kernels.recurrent_grid import Gates, Steps, advance, linear_scan, outer, stencil
from tessera.tensor_memory import TensorMemory, TensorMemoryConfig


def problem(
    channels: int, size: tuple[int, int, int], steps: int, masked: bool, see_state: bool, taps: bool, reads: int = 2
) -> list[Tensor | None]:
    batch = 3
    h, c = torch.randn(2, batch, channels, *size).tanh().unbind(0)
    written = [torch.randn(batch, steps, n, channels) for n in size]
    masks = [(torch.rand(batch, steps, n) - 0.3).clamp(min=0) if masked else None for n in size]
    read = torch.rand(batch, steps, reads, 3) * (torch.tensor(size) - 1)
    inputs = (2 if see_state else 1) * channels
    weight, bias = torch.randn(4 * channels, inputs) / inputs**0.5, torch.randn(4 * channels)
    return [h, c, *written, *masks, read, weight, bias, torch.randn(3, channels, 3) / 2 if taps and see_state else None]


def split(given: list[Any]) -> tuple[Tensor, Tensor, Steps, Gates]:
    h, c, w0, w1, w2, m0, m1, m2, read, *gates = given
    return h, c, Steps((w0, w1, w2), None if m0 is None else (m0, m1, m2), read), Gates(*gates)


def results(form: Any, given: list[Tensor | None]) -> list[Tensor]:
    """Return the outputs, and the gradients of all inputs."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in given]
    out = form(*split(leaves))
    # The same for every form.
    with torch.random.fork_rng():
        loss = sum((x * torch.randn(x.shape).to(x)).sum() for x in out)
    grads = torch.autograd.grad(loss, [x for x in leaves if x is not None])
    # Where a mask is zero, nothing is computed and there is no gradient.
    live = [None if x is None else (x != 0) | (i not in (5, 6, 7)) for i, x in enumerate(given)]
    return [*out, *(g * m for g, m in zip(grads, [m for m in live if m is not None], strict=True))]


CASES = [
    (5, (3, 4, 5), 11, False, True, True),
    (5, (3, 4, 5), 11, True, True, True),
    (17, (2, 3, 4), 5, True, True, False),
    (16, (1, 1, 6), 9, False, True, True),
    (33, (1, 4, 2), 4, True, False, False),
    (4, (5, 1, 3), 1, False, False, False),
    (8, (6, 6, 6), 3, True, True, True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("every", [1, 3])
def test_segments_do_not_change_the_result(case: Any, every: int) -> None:
    given = problem(*case)
    wanted = results(lambda *x: advance(*x, every=case[2]), given)
    for a, b in zip(results(lambda *x: advance(*x, every=every), given), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("level", cpu.levels())
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_is_the_reference_forward_and_backward(case: Any, level: str) -> None:
    given = problem(*case)
    wanted = results(advance, given)
    found = results(lambda *x: dispatch.advance(*x, f"cpu:{level}"), given)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_compiled_steps_are_the_reference_forward_and_backward(case: Any) -> None:
    given = problem(*case)
    wanted = results(advance, given)
    for a, b in zip(results(lambda *x: advance(*x, every=3, compiled=True), given), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_a_gpu_it_is_the_reference_forward_and_backward(case: Any) -> None:
    given = problem(*case)
    wanted = results(advance, given)
    moved = [None if x is None else x.cuda() for x in given]
    for backend in ("auto", "triton"):
        for a, b in zip(results(lambda *x, name=backend: dispatch.advance(*x, name), moved), wanted, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(cpu.MISSING is not None, reason=str(cpu.MISSING))
def test_the_kernel_takes_steps_that_change_no_cell_and_places_at_the_border() -> None:
    given = problem(5, (3, 4, 5), 4, True, True, True)
    given[5] = torch.zeros_like(given[5])
    given[8] = given[8].round()
    wanted, found = results(advance, given), results(lambda *x: dispatch.advance(*x, "cpu"), given)
    assert torch.equal(found[1], given[0])
    for a, b in zip([*found[:5], *found[12:]], [*wanted[:5], *wanted[12:]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(cpu.MISSING is not None, reason=str(cpu.MISSING))
def test_gradients_do_not_depend_on_how_threads_share_the_work() -> None:
    given = problem(5, (3, 4, 5), 6, True, True, True)
    first, second = (results(lambda *x: dispatch.advance(*x, "cpu"), given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(cpu.MISSING is not None, reason=str(cpu.MISSING))
def test_the_kernel_refuses_what_it_does_not_know() -> None:
    given = [None if x is None else x.double() for x in problem(3, (2, 2, 2), 2, False, True, True)]
    with pytest.raises(ValueError, match="takes float32 on the CPU"):
        dispatch.advance(*split(given), "cpu")
    assert dispatch.advance(*split(given))[0].dtype == torch.float64


@pytest.mark.parametrize("steps", [1, 2, 7, 64, 100])
def test_the_linear_scan_is_its_loop(steps: int) -> None:
    decay = torch.rand(2, steps, 5, dtype=torch.float64).requires_grad_()
    added, start = (torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((2, steps, 5), (2, 5)))
    x, wanted = start, []
    for t in range(steps):
        x = decay[:, t] * x + added[:, t]
        wanted.append(x)
    loop, fast = torch.stack(wanted, dim=1), linear_scan(decay, added, start)
    torch.testing.assert_close(fast, loop)
    weights = torch.randn_like(loop)
    grads = [torch.autograd.grad((x * weights).sum(), (decay, added, start)) for x in (fast, loop)]
    torch.testing.assert_close(grads[0], grads[1])


def test_a_stencil_of_a_product_is_a_product_of_stencils() -> None:
    vectors = [torch.randn(2, 1, n, 3) for n in (3, 4, 5)]
    taps = torch.randn(3, 3, 3)
    near = [
        torch.nn.functional.pad(v, (0, 0, 1, 1)).unfold(2, 3, 1).mul(t[:, :]).sum(-1)
        for v, t in zip(vectors, taps, strict=True)
    ]
    torch.testing.assert_close(outer(near)[:, 0], stencil(outer(vectors)[:, 0], taps), rtol=1e-4, atol=1e-5)


def test_the_slow_form_says_once_that_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "MISSING", "no compiler")
    monkeypatch.setattr(dispatch.cpu_grid, "refusal", lambda *_: "no compiler")
    dispatch.say_once.cache_clear()
    memory = TensorMemory(TensorMemoryConfig(channels=2, grid=(2, 2)), 4)
    with pytest.warns(UserWarning, match="Tensor Memory runs in plain PyTorch, which is slow: no compiler"):
        memory(torch.randn(1, 2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory(torch.randn(1, 2, 4))
    dispatch.say_once.cache_clear()
