"""The kernels that define attention over parts agree with an explicit softmax."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tessera import codecs, kernels
from tessera.kernels import AttendParams, cpu, dispatch, reference
from tessera.kernels.reference import attend_exact, merge

SCALE = 0.3


def written_out(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """Compute attention explicitly. seen: (..., queries, keys) bool."""
    group = q.shape[1] // k.shape[1]
    k, v = k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = q.double() @ k.transpose(-1, -2) * SCALE
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0)[..., None])
    return (weights @ v).float(), lse.float()


def inputs(queries: int, keys: int, heads: int = 4, kv_heads: int = 2, dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, heads, queries, dim), torch.randn(2, kv_heads, keys, dim), torch.randn(2, kv_heads, keys, dim)


def rule(queries: int, keys: int, start: int | None, window: int | None) -> Tensor:
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if start is not None:
        query, key = torch.arange(start, start + queries)[:, None], torch.arange(keys)
        seen = key <= query
        if window is not None:
            seen &= key > query - window
    return seen


@pytest.fixture(params=[1 << 23, 3000], ids=["whole", "tiled"])
def _scores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "SCORES", request.param)


@pytest.mark.usefixtures("_scores")
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "start", "window"),
    [
        (1, 1, 2, None, None),
        (1, 700, 4, None, None),
        (5, 1300, 8, None, None),
        (7, 7, 2, 0, None),
        (33, 300, 4, 267, None),
        (33, 300, 4, 290, 40),
        (5, 300, 4, -2, None),
        (40, 30, 2, 10, 7),
        (3, 20, 2, 100, 30),
    ],
)
def test_exact(
    queries: int, keys: int, heads: int, start: int | None, window: int | None, masked: bool, softcap: float | None
) -> None:
    q, k, v = inputs(queries, keys, heads)
    seen = rule(queries, keys, start, window)
    mask = torch.rand(2, 1, queries, keys) > 0.4 if masked else None
    expected = written_out(q, k, v, seen if mask is None else seen & mask, softcap)
    found = attend_exact(q, k, v, AttendParams(SCALE, mask, softcap, start=start, window=window))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    if cpu.attend_exact_refusal(q, k, v) is None:
        for level in cpu.levels():
            found = cpu.attend_exact(q, k, v, AttendParams(SCALE, mask, softcap, start=start, window=window), level=level)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(cpu.MISSING is not None, reason=str(cpu.MISSING))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_queries_over_exact_keys_run_in_cpp(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.to(dtype) for x in inputs(2, 300, 4))
    k = torch.cat((k, k), dim=2)[:, :, 100:400]  # strided, like a ring buffer
    wanted = attend_exact(q, k, v, AttendParams(SCALE))
    monkeypatch.setattr(dispatch.reference, "attend_exact", None)
    assert dispatch.exact_family(q, k, v, AttendParams(SCALE)) == "cpu"
    torch.testing.assert_close(dispatch.attend_exact(q, k, v, AttendParams(SCALE)), wanted, atol=1e-5, rtol=1e-4)
    q[0, 1, 1, 3] = torch.nan
    out, lse = dispatch.attend_exact(q, k, v, AttendParams(SCALE))
    assert out[0, 1, 1].isnan().all()
    assert lse.isnan().sum() == 1


def test_gradients_are_left_to_the_definition() -> None:
    q, k, v = inputs(200, 20)
    few = q[:, :, :2].requires_grad_()
    assert dispatch.exact_family(few, k, v, AttendParams(SCALE)) == "reference"
    out, _ = dispatch.attend_exact(few, k, v, AttendParams(SCALE))
    assert torch.autograd.grad(out.sum(), few)[0].shape == few.shape


@pytest.mark.usefixtures("_scores")
@pytest.mark.parametrize("spec", codecs.examples() or ["none"])
@pytest.mark.parametrize(("start", "window"), [(None, None), (310, 100)])
def test_packed_is_exact_over_what_is_decoded(spec: str, start: int | None, window: int | None) -> None:
    if spec == "none":
        pytest.skip("no codec is registered")
    codec = codecs.get(spec)
    q, k, v = inputs(9, 320, dim=32)
    packed_k, packed_v = codec.encode(k, "key", 1), codec.encode(v, "value", 1)
    found = kernels.attend(q, packed_k, packed_v, SCALE, start=start, window=window, backend="reference")
    expected = attend_exact(q, packed_k.decode(), packed_v.decode(), AttendParams(SCALE, start=start, window=window))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cuts", [(300,), (1, 299), (64, 64, 172), (150, 0, 150)])
def test_merge_is_one_softmax(cuts: tuple[int, ...]) -> None:
    q, k, v = inputs(6, 300)
    seen = rule(6, 300, 293, None)
    seen[2] = False  # one query that sees nothing
    mask = seen.expand(2, 1, 6, 300)
    parts = [
        attend_exact(q, kp, vp, AttendParams(SCALE, m))
        for kp, vp, m in zip(k.split(cuts, 2), v.split(cuts, 2), mask.split(cuts, 3), strict=True)
    ]
    expected = written_out(q, k, v, seen)
    for join in (merge, dispatch.merge):
        torch.testing.assert_close(join(parts), expected, atol=1e-5, rtol=1e-4)
        assert (join(parts)[0][:, :, 2] == 0).all()
        assert (join(parts)[1][:, :, 2] == -math.inf).all()


def test_large_scores_do_not_overflow() -> None:
    q, k, v = inputs(3, 600)
    out, lse = attend_exact(q * 1e4, k, v, AttendParams(SCALE))
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()
    torch.testing.assert_close(out, written_out(q * 1e4, k, v, rule(3, 600, None, None))[0], atol=1e-3, rtol=1e-3)


def test_half_precision_is_accumulated_in_float32() -> None:
    q, k, v = inputs(3, 2000)
    out, lse = attend_exact(q.bfloat16(), k.bfloat16(), v.bfloat16(), AttendParams(SCALE))
    assert out.dtype == lse.dtype == torch.float32
    wide = written_out(q.bfloat16().float(), k.bfloat16().float(), v.bfloat16().float(), rule(3, 2000, None, None))
    torch.testing.assert_close((out, lse), wide, atol=1e-5, rtol=1e-4)


def test_gradients() -> None:
    q, k, v = (x.double()[:1].requires_grad_() for x in inputs(4, 20))
    assert torch.autograd.gradcheck(
        lambda a, b, c: attend_exact(a, b, c, AttendParams(SCALE, start=14))[0], (q, k, v), eps=1e-3, atol=2e-2, nondet_tol=1e-6
    )


def test_shapes_are_checked() -> None:
    q, k, v = inputs(3, 20)
    with pytest.raises(ValueError, match="do not fit keys"):
        attend_exact(q[:, :3], k, v, AttendParams(SCALE))
    with pytest.raises(ValueError, match="do not fit keys"):
        attend_exact(q[..., :8], k, v, AttendParams(SCALE))
    with pytest.raises(ValueError, match="differ in shape"):
        attend_exact(q, k, v[:, :, :5], AttendParams(SCALE))
    with pytest.raises(ValueError, match="does not fit 3 queries and 20 keys"):
        attend_exact(q, k, v, AttendParams(SCALE, torch.ones(1, 1, 3, 19, dtype=torch.bool)))
