"""The kernels of flash-linear-attention agree with the token loop."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tessera.tensor_cache import TensorCache, TensorCacheConfig, fused
from tessera.tensor_cache.fused import fused_scan, refusal
from tessera.tensor_cache.recurrence import loop

RULES = ("outer", "delta")


def inputs(tokens: int, dim: int, device: str = "cpu") -> list[Tensor]:
    q = torch.randn(2, 3, 2, tokens, dim, device=device)
    k = normalize(torch.randn(2, 3, tokens, dim, device=device), dim=-1)
    v = torch.randn(2, 3, tokens, dim, device=device)
    g = -torch.rand(2, 3, tokens, device=device) * 0.1
    eta = torch.rand(2, 3, tokens, device=device) * 0.8
    return [q, k, v, g, eta, torch.randn(2, 3, dim, dim, device=device)]


@pytest.mark.parametrize("rule", RULES)
def test_their_definition_is_ours(rule: str) -> None:
    """flash-linear-attention's plain PyTorch forms give the same results for the kernels' arguments."""
    pytest.importorskip("fla", reason="fla-core is not installed; it comes with the extra gpu")
    if rule == "delta":
        kernel = import_module("fla.ops.gated_delta_rule.naive").naive_recurrent_gated_delta_rule
    else:
        kernel = import_module("fla.ops.simple_gla.naive").naive_chunk_simple_gla
    x = inputs(50, 16)
    torch.testing.assert_close(fused_scan(*x, rule, kernel), loop(*x, rule), rtol=1e-4, atol=1e-4)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run flash-linear-attention's kernels on a CPU. Triton's interpreter cannot autotune, so the first variant is used; and it
    counts loops with plain integers, where these kernels expect tensors.
    """
    if torch.cuda.is_available():
        pytest.skip("with a CUDA device the kernels themselves are tested")
    if fused.missing():
        pytest.skip(str(fused.missing()))
    tl, tuner = import_module("triton.language"), import_module("triton.runtime.autotuner").Autotuner
    run = tuner.run

    def first(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.configs = self.configs[:1]
        return run(self, *args, **kwargs)

    def number(x: Any) -> int:
        return int(x.handle.data.item()) if hasattr(x, "handle") else int(getattr(x, "value", x))

    def counted(*bounds: Any) -> Iterator[Any]:
        return (tl.full((), i, tl.int32) for i in range(*map(number, bounds)))

    monkeypatch.setattr(tuner, "run", first)
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops") and isinstance(module, ModuleType):
            monkeypatch.setitem(vars(module), "range", counted)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tokens", [1, 70])
def test_interpreted_kernels_are_the_loop_forward_and_backward(rule: str, tokens: int) -> None:
    x = [t.requires_grad_() for t in inputs(tokens, 16)]
    results = []
    for form in (fused_scan, loop):
        reads, end = form(*x, rule)
        loss = (reads * torch.linspace(-1, 1, 16)).sum() + end.square().sum()
        results.append((reads, end, *torch.autograd.grad(loss, x)))
    for fast, slow in zip(*results, strict=True):
        assert (fast - slow).norm() <= 1e-5 * slow.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tokens", [1, 64, 200])
def test_kernels_are_the_loop_forward_and_backward(rule: str, tokens: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; run on one with: pytest -m gpu")
    if fused.missing():
        pytest.skip(str(fused.missing()))
    x = [t.requires_grad_() for t in inputs(tokens, 64, "cuda")]
    results = []
    for form in (fused_scan, loop):
        reads, end = form(*x, rule)
        loss = (reads * torch.linspace(-1, 1, 64, device="cuda")).sum() + end.square().sum()
        results.append((reads, end, *torch.autograd.grad(loss, x)))
    for fast, slow in zip(*results, strict=True):
        assert (fast - slow).norm() <= 1e-2 * slow.norm()  # their products use TF32


def test_a_memory_says_why_the_kernels_are_not_used() -> None:
    q, v = torch.zeros(1, 1, 1, 8, 64), torch.zeros(1, 1, 8, 64)
    assert "cpu" in str(refusal(q, v, "delta", "write_first"))


def test_a_memory_uses_the_kernels_that_are_asked_for_where_they_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []

    def instead(*x: Tensor, **_: object) -> tuple[Tensor, Tensor]:
        used.append("kernel")
        return loop(*x[:6], x[6])  # type: ignore[arg-type]

    memory = TensorCache(TensorCacheConfig(window=4, sink=0), 2, 16)
    q, k, v = torch.randn(3, 1, 2, 20, 16)
    expected, _ = memory(q, k, v)
    monkeypatch.setattr("tessera.tensor_cache.forms.fused_refusal", lambda *_: None)
    monkeypatch.setattr("tessera.tensor_cache.forms.fused_scan", instead)
    monkeypatch.setenv("TESSERA_BACKEND", "triton")  # on the CPU they are used only if requested
    found, _ = memory(q, k, v)
    assert used == ["kernel"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
