"""Triton attention over scalar codes agrees with its definition."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from kernel_inputs import make_pages, relative
from triton_checks import DEVICE, HALF, check, moved

from tessera import codecs
from tessera.codecs.scalar import normal_levels
from tessera.kernels import AttendParams, CompressedKV, dispatch, reference, triton
from tessera.kernels.triton.formats import TERMS, lookups
from tessera.kernels.triton.tables import curve

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize(
    "spec", [*(f"scalar:{b}" for b in range(2, 7)), *(f"int:{b}" for b in range(2, 9)), "fp8", "fp8:scaled"]
)
def test_attention_equals_the_reference(spec: str) -> None:
    check(codecs.get(spec), (1, 4, 2, 2), [64, 21], 80, start=70)


@pytest.mark.parametrize("dim", [20, 36, 48, 112])
@pytest.mark.parametrize("spec", ["int:2", "int:4", "kivi:2", "kivi:4", "(k=scalar:2,v=scalar:4)"])
def test_codes_that_fill_words_and_codes_that_do_not_equal_the_reference(spec: str, dim: int) -> None:
    """With 20 and 36 numbers neither 2 nor 4 bits fill words; with 48 and 112 both do."""
    lookup = "curve" if "scalar" in spec else None
    check(codecs.get(spec), (1, 2, 1, 2), [64, 33], dim, start=95, lookup=lookup)


@pytest.mark.parametrize("spec", ["q4_0", "q4_0:norot", "q8_0", "(k=q8_0,v=hqmq:3)", "(k=kivi:4,v=q4_0)"])
@pytest.mark.parametrize("dim", [32, 96])
def test_blocks_with_a_scale_of_their_own_equal_the_reference(spec: str, dim: int) -> None:
    check(codecs.get(spec), (1, 4, 2, 2), [64, 21], dim, start=70)


@pytest.mark.parametrize("spec", [*(f"kivi:{bits}" for bits in range(2, 9)), "(k=kivi:4,v=hqmq:3)", "(k=hqmq:4,v=kivi:3)"])
def test_groups_with_a_scale_and_a_low_equal_the_reference(spec: str) -> None:
    """With 80 channels, the last group of a value has 16."""
    check(codecs.get(spec), (2, 2, 1, 3), [64, 45], 80, start=100, window=90)


@pytest.mark.parametrize(("spec", "ratio"), [("q8_0:norot", 300.0), ("kivi:8", 3e4), ("kivi:2", 3e4)])
def test_scales_that_differ_by_much_and_vectors_of_zeros_keep_their_digits(spec: str, ratio: float) -> None:
    x = torch.randn(1, 1, 96, 64)
    x[..., :32] *= ratio
    x[:, :, 5:9] = 0
    x[:, :, 9:12] *= 1e-6
    q = torch.randn(1, 1, 2, 64)
    q[..., :32] /= ratio
    codec = codecs.get(spec)
    pages = CompressedKV([(codec.encode(x, "key"), codec.encode(x))])
    out, lse = triton.attend(q.to(DEVICE), moved(pages), AttendParams(0.3))
    wanted, wanted_lse = reference.attend(q, pages, AttendParams(0.3))
    for part in (slice(0, 32), slice(32, 64)):
        assert relative(out.cpu()[..., part], wanted[..., part]) < HALF
    assert torch.allclose(lse.cpu(), wanted_lse, atol=2e-2)


@pytest.mark.parametrize("spec", ["scalar:2", "scalar:3", "scalar:4", "scalar:5", "(k=scalar:4,v=scalar:6)"])
def test_every_way_to_read_levels_equals_the_reference(spec: str) -> None:
    keys, _ = make_pages(codecs.get(spec), 1, 1, [1], 64).form()
    for lookup in lookups(keys):  # type: ignore[arg-type]
        check(codecs.get(spec), (1, 2, 1, 1), [70], 64, lookup=lookup)


@pytest.mark.parametrize(
    "spec",
    [
        "(k=int:8,v=scalar:3)",
        "(k=scalar:4,v=hqmq:3)",
        "(k=hqmq:4,v=int:3)",
        "(k=hqmq:3_nocentre,v=scalar:3)",
        "(k=fp8,v=int:7)",
        "(k=int:5,v=fp8:scaled)",
    ],
)
def test_keys_and_values_of_different_codecs_equal_the_reference(spec: str) -> None:
    check(codecs.get(spec), (1, 4, 2, 3), [64, 33], 96, start=90, window=60)


@pytest.mark.parametrize("spec", ["scalar:4", "scalar:3", "int:4", "int:7", "kivi:3"])
@pytest.mark.parametrize(
    ("shape", "sizes", "dim", "rule"),
    [
        ((2, 2, 1, 3), [100], 80, {}),
        ((1, 3, 1, 7), [64, 5], 20, {"start": 66, "window": 30}),
        ((1, 2, 2, 1), [70], 128, {"softcap": 2.0, "splits": 2}),
        ((1, 2, 1, 2), [70], 256, {"mask": torch.arange(140).view(1, 1, 2, 70) % 3 > 0}),
    ],
    ids=["rows", "window", "cap", "mask"],
)
def test_odd_shapes_and_rules_equal_the_reference(
    spec: str, shape: tuple[int, int, int, int], sizes: list[int], dim: int, rule: dict[str, Any]
) -> None:
    check(codecs.get(spec), shape, sizes, dim, **rule)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value"),
    list(permutations(("hqmq:3", "scalar:3", "scalar:4", "scalar:6", "int:5", "q4_0", "q8_0", "kivi:3", "fp8"), 2)),
)
@pytest.mark.parametrize(
    ("shape", "sizes", "dim", "rule"),
    [
        ((2, 6, 2, 9), [64, 70, 3], 32, {"start": 131, "window": 100, "softcap": 8.0}),
        ((1, 4, 1, 5), [129], 96, {"mask": torch.arange(5 * 193).view(1, 1, 5, 193)[..., :129] % 7 > 0, "splits": 3}),
        ((1, 2, 2, 1), [40], 256, {"start": 39}),
    ],
    ids=["window", "mask", "wide"],
)
def test_any_two_formats_equal_the_reference(
    key: str, value: str, shape: tuple[int, int, int, int], sizes: list[int], dim: int, rule: dict[str, Any]
) -> None:
    check(codecs.get(f"(k={key},v={value})"), shape, sizes, dim, **rule)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_queries_in_half_precision_equal_the_reference(dtype: torch.dtype) -> None:
    pages = make_pages(codecs.get("(k=int:8,v=scalar:3)"), 1, 2, [64, 21], 64)
    q = torch.randn(1, 4, 2, 64).to(dtype)
    out, _ = triton.attend(q.to(DEVICE), moved(pages), AttendParams(0.05))
    assert relative(out.cpu(), reference.attend(q, pages, AttendParams(0.05))[0]) < HALF


@pytest.mark.parametrize("spec", ["scalar:3", "int:5", "kivi:3", "(k=kivi:5,v=int:3)"])
def test_pages_that_begin_anywhere_and_pages_of_nothing(spec: str) -> None:
    """The number of bytes in a row is odd, and so are addresses."""
    codec = codecs.get(spec)
    k, v = torch.randn(2, 2, 2, 200, 20).unbind(0)
    keys, values = codec.encode(k, "key"), codec.encode(v)
    cuts = [(0, 0), (5, 70), (70, 131), (140, 140), (151, 200)]
    pages = CompressedKV([(keys.slice(a, b), values.slice(a, b)) for a, b in cuts])
    q = torch.randn(2, 4, 3, 20)
    out, lse = triton.attend(q.to(DEVICE), moved(pages), AttendParams(0.1, start=170, window=150))
    wanted, wanted_lse = reference.attend(q, pages, AttendParams(0.1, start=170, window=150))
    assert relative(out.cpu(), wanted) < HALF
    assert torch.allclose(lse.cpu(), wanted_lse, atol=2e-2, rtol=1e-3)


def test_uniform_codes_of_keys_that_cancel_keep_their_digits() -> None:
    """The code of zero is subtracted from the score, not from the codes, which for queries of equal numbers cancels
    strongly."""
    codec = codecs.get("int:8")
    k, v = torch.randn(2, 1, 1, 64, 128).unbind(0)
    k[..., 0] = 100
    pages = CompressedKV([(codec.encode(k, "key"), codec.encode(v))])
    q = 1 + 0.01 * torch.randn(1, 1, 2, 128)
    out, lse = triton.attend(q.to(DEVICE), moved(pages), AttendParams(0.1))
    wanted, wanted_lse = reference.attend(q, pages, AttendParams(0.1))
    assert relative(out.cpu(), wanted) < HALF
    assert torch.allclose(lse.cpu(), wanted_lse, atol=2e-2)


@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("spec", ["int:3", "int:4", "int:7", "int:8", "fp8", "fp8:scaled"])
def test_vectors_decode_as_the_codec_defines(spec: str, role: Any) -> None:
    codec = codecs.get(spec)
    packed = codec.encode(torch.randn(2, 3, 150, 80), role).slice(5, 141)
    got = dispatch.DECODE(packed.to(DEVICE), backend="triton")
    assert triton.decode_refusal(packed.to(DEVICE)) is None
    assert relative(got.cpu(), codec.decode_reference(packed)) < 1e-6


def test_levels_in_half_precision_are_not_decoded() -> None:
    packed = codecs.get("scalar:4").encode(torch.randn(1, 1, 4, 64), "key").to(DEVICE)
    assert "round the numbers of scalar:4 to half precision" in str(triton.decode_refusal(packed))
    assert torch.equal(dispatch.decode(packed, backend="triton"), packed.codec.decode_reference(packed))


@pytest.mark.parametrize("bits", TERMS)
def test_the_polynomial_gives_the_levels(bits: int) -> None:
    n, terms = 2**bits, curve(normal_levels(bits))
    x = ((2 * torch.arange(n) + 1) / n - 1).half()
    got = terms[-1]
    for term in reversed(terms[:-1]):
        got = got * (x * x) + term
    assert terms.dtype == torch.float16
    assert (got * x / normal_levels(bits) - 1).abs().max() < 1.5e-3


def test_the_kernel_runs_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    real = triton.attend
    monkeypatch.setattr(triton, "attend", lambda *a, **k: (ran.append(1), real(*a, **k))[1])
    q = torch.randn(1, 1, 1, 64, device=DEVICE)
    for spec in ("scalar:4", "int:4", "fp8", "kivi:4", "(k=q8_0,v=scalar:3)"):
        dispatch.attend(q, moved(make_pages(codecs.get(spec), 1, 1, [64], 64)), AttendParams(0.1), backend="triton")
    assert len(ran) == 5


def test_a_way_to_read_that_a_format_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="no lookup 'curve'; there are pairs, held pairs"):
        check(codecs.get("scalar:5"), (1, 1, 1, 1), [64], 64, lookup="curve")
    with pytest.raises(ValueError, match="no lookup 'moves'; there are integers"):
        check(codecs.get("int:4"), (1, 1, 1, 1), [64], 64, lookup="moves")


@pytest.mark.parametrize("spec", ["q4_0", "(k=hqmq:4,v=q8_0)"])
def test_vectors_whose_last_block_is_incomplete_are_refused(spec: str) -> None:
    pages = moved(make_pages(codecs.get(spec), 1, 1, [64], 80))
    q = torch.randn(1, 1, 1, 80, device=DEVICE)
    assert triton.attend_refusal(q, pages) == "head_dim 80 is no multiple of 32, the numbers of a block"
    with pytest.raises(ValueError, match="head_dim 80 is no multiple of 32"):
        triton.attend(q, pages, AttendParams(0.1))
    with pytest.raises(ValueError, match="head_dim 80 is no multiple of 32"):
        dispatch.attend(q, pages, AttendParams(0.1), backend="triton")
