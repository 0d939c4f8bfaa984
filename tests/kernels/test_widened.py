"""Every kernel reads keys whose channels were multiplied by widths as the definition does."""

from __future__ import annotations

import pytest
import torch
from kernel_inputs import relative
from torch import Tensor

from tessera import codecs
from tessera.codecs.channel_stats import KeyStats
from tessera.kernels import AttendParams, CompressedKV, cpu, reference, triton
from tessera.tiers import QuantizedTier

#: Rows, query heads, key heads, query tokens, head_dim.
SHAPES = [(1, 4, 2, 1, 64), (3, 6, 2, 5, 32), (2, 3, 3, 1, 128), (1, 10, 2, 3, 20)]


def tier(spec: str, rows: int, heads: int, dim: int, tokens: int = 192) -> tuple[QuantizedTier, Tensor, Tensor]:
    """Return packed keys with channels of very different widths, and the keys themselves."""
    k, v = torch.randn(2, rows, heads, tokens, dim).unbind(0)
    k = k * (1.5 * torch.randn(rows, heads, 1, dim)).exp() + torch.randn(rows, heads, 1, dim)
    found = QuantizedTier(codecs.get(spec), 0)
    found.stats = KeyStats.measure((torch.rand(rows, heads, 64, dim) * 4 - 2).exp(), k)
    found.append(k[:, :, :128], v[:, :, :128])
    found.append(k[:, :, 128:], v[:, :, 128:])
    return found, k, v


def by_hand(q: Tensor, pages: CompressedKV) -> Tensor:
    """Compute attention over decoded keys and values in float64."""
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in pages.decode())
    return ((q.double() @ k.mT).softmax(-1) @ v).float()


@pytest.mark.parametrize("spec", ["hqmq:4", "hqmq:k3v4", "(k=hqmq:4,v=q8_0)"])
@pytest.mark.parametrize(("rows", "q_heads", "heads", "queries", "dim"), SHAPES)
def test_the_definition_reads_decoded_keys(spec: str, rows: int, q_heads: int, heads: int, queries: int, dim: int) -> None:
    held, k, _ = tier(spec, rows, heads, dim)
    q = torch.randn(rows, q_heads, queries, dim) / 4
    assert relative(reference.attend(q, held.view, AttendParams(1.0))[0], by_hand(q, held.view)) < 1e-5
    assert relative(held.view.decode()[0], k) < 0.2
    assert torch.equal(held.view.narrowed(q), held.view.narrowed(q.transpose(1, 2).contiguous().transpose(1, 2)))


@pytest.mark.skipif(cpu.MISSING is not None, reason=str(cpu.MISSING))
@pytest.mark.parametrize("level", cpu.levels())
@pytest.mark.parametrize("spec", ["hqmq:4", "hqmq:3.5", "hqmq:k3v4"])
@pytest.mark.parametrize(("rows", "q_heads", "heads", "queries", "dim"), SHAPES)
def test_the_cpp_kernels_do(spec: str, level: str, rows: int, q_heads: int, heads: int, queries: int, dim: int) -> None:
    held, _, _ = tier(spec, rows, heads, dim)
    q = torch.randn(rows, q_heads, queries, dim) / 4
    assert torch.equal(cpu._narrowed(q, held.view), held.view.narrowed(q))
    out, _ = cpu.attend(q, held.view, AttendParams(1.0), level=level, limbs=3)
    assert relative(out, by_hand(q, held.view)) < 1e-4
    for part in (q.bfloat16(), q.transpose(1, 2).contiguous().transpose(1, 2)):
        assert relative(cpu.attend(part, held.view, AttendParams(1.0), level=level)[0], by_hand(part.float(), held.view)) < 2e-3


@pytest.mark.skipif(triton.missing() is not None or not triton.interpreted(), reason="Triton is not interpreted here")
@pytest.mark.parametrize(("rows", "q_heads", "heads", "queries", "dim"), SHAPES[:3])
def test_the_triton_kernels_do(rows: int, q_heads: int, heads: int, queries: int, dim: int) -> None:
    held, _, _ = tier("hqmq:4", rows, heads, dim)
    q = torch.randn(rows, q_heads, queries, dim) / 4
    assert triton.attend_refusal(q, held.view) is None
    assert relative(triton.attend(q, held.view, AttendParams(1.0))[0], by_hand(q, held.view)) < 1e-2
