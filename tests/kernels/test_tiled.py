"""Attention of many queries by tiles agrees with the definition."""

from __future__ import annotations

import pytest
import torch
from kernel_inputs import make_pages, relative
from torch import Tensor

import tessera.kernels
from tessera import codecs
from tessera.kernels import AttendParams, cpu, dispatch, reference
from tessera.kernels.cpu import tiled

SCALE = 0.3


def inputs(queries: int, keys: int, heads: int, kv_heads: int, dim: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(queries + keys)
    q = torch.randn(batch, heads, queries, dim)
    # Strided, like the front of a buffer.
    k, v = torch.randn(2, batch, kv_heads, keys + 13, dim)[..., :keys, :].unbind(0)
    return q, k, v


@pytest.fixture(params=[tiled.TILE_BYTES, 0], ids=["one tile", "many tiles"])
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "TILE_BYTES", request.param)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "kv_heads", "dim", "start"),
    [
        (33, 300, 4, 4, 16, None),
        (200, 131, 6, 2, 20, None),
        (7, 1, 2, 1, 3, None),
        (129, 129, 6, 2, 64, 0),
        (70, 300, 9, 3, 64, 230),
        (70, 300, 8, 1, 24, 120),
        (200, 90, 4, 2, 16, 0),
        (200, 90, 4, 2, 16, 40),
        (40, 90, 4, 2, 16, 100),
        (1, 100, 4, 2, 16, 3),
    ],
)
def test_exact_keys(
    dtype: torch.dtype, queries: int, keys: int, heads: int, kv_heads: int, dim: int, start: int | None
) -> None:
    q, k, v = (x.to(dtype) for x in inputs(queries, keys, heads, kv_heads, dim))
    params = AttendParams(SCALE, start=start)
    assert tiled.exact_tiled_refusal(q, k, v, params) is None
    found = tiled.attend_exact_tiled(q, k, v, params)
    wanted = reference.attend_exact(q, k, v, params)
    for got, right in zip(found, wanted, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, right, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [tiled.WINDOW_TILE, 37])
@pytest.mark.parametrize(
    ("queries", "keys", "start", "window"),
    [
        (300, 300, 0, 64),
        (70, 500, 430, 128),
        (200, 500, 400, 128),
        (300, 200, 150, 100),
        (513, 513, 0, 512),
        (5, 900, 895, 70),
        (100, 100, 0, 400),
        (90, 100, 300, 64),
        (300, 296, -4, 64),
        (50, 20, -70, 64),
        (700, 700, 0, 650),
    ],
)
def test_exact_keys_in_a_window(
    queries: int, keys: int, start: int, window: int, size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiled, "WINDOW_TILE", size)
    q, k, v = (x.to(dtype) for x in inputs(queries, keys, 6, 2, 24))
    params = AttendParams(SCALE, start=start, window=window)
    assert tiled.exact_tiled_refusal(q, k, v, params) is None
    found = tiled.attend_exact_tiled(q, k, v, params)
    for got, right in zip(found, reference.attend_exact(q, k, v, params), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, right, atol=2e-5, rtol=1e-4)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("spec", ["hqmq:4", "q4_0", "kivi:4", "scalar:4", "hqmq:s96_r4"])
@pytest.mark.parametrize("start", [None, 300, 400])
def test_codes(spec: str, start: int | None) -> None:
    torch.manual_seed(0)
    pages = make_pages(codecs.get(spec), 2, 2, [256, 64, 127], 64)
    q = torch.randn(2, 6, 70, 64)
    params = AttendParams(0.05, start=start)
    found, wanted = tiled.attend_tiled(q, pages, params), reference.attend(q, pages, params)
    for got, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, right, atol=2e-4, rtol=1e-4)


def test_never_more_than_a_tile_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "TILE_BYTES", 16 * 2 * 2 * 64 * 128)
    pages = make_pages(codecs.get("q4_0"), 2, 2, [256, 256, 88], 64)
    decoded = []
    decode = tessera.kernels.CompressedKV.decode

    def noted(self: tessera.kernels.CompressedKV, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        found = decode(self, start, stop)
        decoded.append(found[0].shape[2])
        return found

    monkeypatch.setattr(tessera.kernels.CompressedKV, "decode", noted)
    tiled.attend_tiled(torch.randn(2, 4, 40, 64), pages, AttendParams(0.1))
    assert decoded == [128, 128, 128, 128, 88]


def test_the_fastest_way_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(tiled, "WIDE_KERNEL", 200)
    monkeypatch.setattr(tiled, "SLOW_KERNEL", 200)
    for module, name in ((tiled, "attend_tiled"), (tiled, "attend_exact_tiled"), (cpu, "attend"), (cpu, "attend_exact")):

        def note(*args: object, run: object = getattr(module, name), name: str = name, **options: object) -> object:
            ran.append(name)
            return run(*args, **options)  # type: ignore[operator]

        monkeypatch.setattr(module, name, note)
    monkeypatch.setattr(reference, "attend_exact", None)
    q, k, v = inputs(100, 64, 6, 2, 64)
    few = q[:, :, :2]
    fast, slow = (make_pages(codecs.get(spec), 2, 2, [64], 64) for spec in ("hqmq:4", "q4_0"))
    plain = AttendParams(0.1)
    dispatch.attend_exact(q, k, v, plain)
    dispatch.attend_exact(q, k, v, AttendParams(0.1, start=-3, window=64))
    dispatch.attend_exact(few, k, v, plain)
    dispatch.attend(q, slow, plain)
    dispatch.attend(q, fast, plain)
    dispatch.attend(few, fast, plain)
    if cpu.MISSING is not None:
        assert ran == [*["attend_exact_tiled"] * 3, "attend_tiled", "attend_tiled"]
    else:
        many = "attend_tiled" if cpu.levels()[-1] in ("portable", "neon") else "attend"
        assert ran == ["attend_exact_tiled", "attend_exact_tiled", "attend_exact", "attend_tiled", many, "attend"]


@pytest.mark.skipif(cpu.MISSING is not None, reason=str(cpu.MISSING))
@pytest.mark.parametrize(
    ("level", "queries", "decoded"), [("portable", 70, True), ("portable", 9, False), ("avx512", 40, False)]
)
def test_a_kernel_that_does_not_multiply_integers_is_left_for_many_queries(
    level: str, queries: int, decoded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if level not in cpu.levels():
        pytest.skip(f"this processor has no {level}")
    pages, q = make_pages(codecs.get("hqmq:s96_r4"), 1, 2, [64], 64), torch.randn(1, 6, queries, 64)
    if decoded:
        monkeypatch.setattr(cpu, "attend", None)
    else:
        monkeypatch.setattr(tiled, "attend_tiled", None)
    found = tiled.attend(q, pages, AttendParams(0.05), level=level)
    torch.testing.assert_close(found, reference.attend(q, pages, AttendParams(0.05)), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "params",
    [
        AttendParams(SCALE, torch.rand(1, 1, 100, 64) > 0.5),
        AttendParams(SCALE, softcap=3.0),
        AttendParams(SCALE, start=0, window=20),
        AttendParams(SCALE, start=-5),
    ],
    ids=["mask", "softcap", "small window", "nothing seen"],
)
def test_rules_that_flash_attention_does_not_know_are_left_to_others(params: AttendParams) -> None:
    q, k, v = inputs(100, 64, 6, 2, 16)
    assert tiled.exact_tiled_refusal(q, k, v, params) is not None
    for got, right in zip(dispatch.attend_exact(q, k, v, params), reference.attend_exact(q, k, v, params), strict=True):
        torch.testing.assert_close(got, right)


def test_gradients_and_other_numbers_are_left_to_the_definition() -> None:
    q, k, v = inputs(100, 64, 6, 2, 16)
    plain = AttendParams(SCALE)
    assert tiled.exact_tiled_refusal(q.double(), k, v, plain) is not None
    assert tiled.exact_tiled_refusal(q, k.to("meta"), v, plain) is not None
    out, _ = dispatch.attend_exact(q.requires_grad_(), k, v, plain)
    assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape


def test_a_query_that_is_not_finite_gives_nothing_finite_and_disturbs_no_other() -> None:
    q, k, v = inputs(100, 64, 6, 2, 16)
    wanted, _ = tiled.attend_exact_tiled(q, k, v, AttendParams(SCALE))
    q[0, 1, 7, 3] = torch.nan
    out, _ = tiled.attend_exact_tiled(q, k, v, AttendParams(SCALE))
    assert out[0, 1, 7].isnan().all()
    out[0, 1, 7] = wanted[0, 1, 7]
    assert relative(out, wanted) < 1e-6


@pytest.mark.parametrize("number", [torch.nan, -torch.inf])
@pytest.mark.parametrize("params", [AttendParams(SCALE, start=0, window=128), AttendParams(SCALE, start=128)])
def test_keys_that_are_not_finite_are_left_to_the_definition(number: float, params: AttendParams) -> None:
    q, k, v = inputs(300, 300, 2, 1, 16)
    k[:, :, 128] = number
    for got, right in zip(tiled.attend_exact_tiled(q, k, v, params), reference.attend_exact(q, k, v, params), strict=True):
        assert torch.equal(got.nan_to_num(7.0), right.nan_to_num(7.0))
