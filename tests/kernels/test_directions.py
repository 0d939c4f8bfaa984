"""The C++ kernels for codes of direction and radius, with outliers, agree with their definition in PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_inputs import make_pages, relative

from tessera import codecs
from tessera.codecs.hqmq import HQMQ
from tessera.kernels import AttendParams, CompressedKV, cpu, directions, dispatch, reference
from tessera.quaternion import conjugate, right_matrix

pytestmark = pytest.mark.skipif(cpu.MISSING is not None, reason=str(cpu.MISSING))

#: Maximum relative error of float32 sums in another order.
FLOAT = 1e-5
#: Codes of 12, 16, 19, 16 and 17 bits, with outliers and without, codebooks by head and shared, rotated or not.
SPECS = ("hqmq:s24_r2", "hqmq:s96_r4", "hqmq:s192_r6_med3", "hqmq:o170_r4", "outliers by vector")


def codec_of(spec: str) -> HQMQ:
    codec = HQMQ(170, 5, 1.5, "optimised", "chi", rotate=True) if spec == "outliers by vector" else codecs.get(spec)
    assert isinstance(codec, HQMQ)
    return codec


@pytest.fixture(params=cpu.levels())
def level(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _define(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the reference decode by the definition, so that it does not share the kernel's mistakes."""
    real = reference.attend

    def attend(*args: Any, **rule: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TESSERA_BACKEND", "reference")
            return real(*args, **rule)

    monkeypatch.setattr(reference, "attend", attend)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "queries", "sizes", "dim"),
    [
        (1, 4, 1, 1, [64], 64),
        (2, 4, 2, 1, [128, 320, 37], 128),
        (2, 6, 2, 3, [300, 1], 80),
        (1, 4, 4, 2, [100], 4),
        (1, 2, 1, 1, [70], 20),
        (1, 2, 2, 33, [90], 36),
    ],
)
def test_attention_equals_the_reference(
    level: str, spec: str, batch: int, heads: int, kv_heads: int, queries: int, sizes: list[int], dim: int
) -> None:
    pages = make_pages(codec_of(spec), batch, kv_heads, sizes, dim)
    q = torch.randn(batch, heads, queries, dim)
    out, lse = cpu.attend(q, pages, AttendParams(dim**-0.5), level=level)
    wanted, wanted_lse = reference.attend(q, pages, AttendParams(dim**-0.5))
    assert relative(out, wanted) < FLOAT
    assert torch.allclose(lse, wanted_lse, atol=1e-4, rtol=1e-5)


def test_there_are_outliers_among_what_is_tested() -> None:
    papers, _ = make_pages(codec_of("hqmq:s192_r6_med3"), 2, 2, [320], 128).pages[0]
    for packed in (papers, *make_pages(codec_of("outliers by vector"), 2, 2, [320], 128).pages[0]):
        assert 0 < len(packed.tensors["kept"]) < packed.tensors["flags"].numel() * 8


@pytest.mark.parametrize("rule", [{"start": 150}, {"start": 165, "window": 40}, {"softcap": 2.0}, {"mask": "rows"}])
def test_masks_windows_and_caps_equal_the_reference(level: str, rule: dict[str, Any]) -> None:
    pages = make_pages(codec_of("hqmq:s96_r4_med3"), 2, 2, [128, 64], 64)
    q = torch.randn(2, 4, 20, 64)
    rule = dict(rule)
    if "mask" in rule:
        rule["mask"] = torch.rand(2, 1, 20, 192) > 0.3
    out, lse = cpu.attend(q, pages, AttendParams(0.2, **rule), level=level)
    wanted, wanted_lse = reference.attend(q, pages, AttendParams(0.2, **rule))
    assert relative(out, wanted) < FLOAT
    assert torch.allclose(lse, wanted_lse, atol=1e-4, rtol=1e-5)


def test_layers_have_codebooks_of_their_own(level: str) -> None:
    codec = codec_of("hqmq:s24_r2")
    x = torch.randn(1, 2, 64, 64)
    q = torch.randn(1, 2, 1, 64)
    for layer in (0, 7):
        pages = CompressedKV([(codec.encode(x, "key", layer), codec.encode(x, "value", layer))])
        assert (
            relative(cpu.attend(q, pages, AttendParams(0.2), level=level)[0], reference.attend(q, pages, AttendParams(0.2))[0])
            < FLOAT
        )


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("tokens", "dim"), [(200, 64), (65, 80), (3, 128), (0, 64)])
def test_decoding_equals_the_definition(level: str, spec: str, tokens: int, dim: int) -> None:
    codec = codec_of(spec)
    for packed in make_pages(codec, 2, 2, [tokens], dim).pages[0]:
        for part in (packed, packed.slice(13, 150), packed.select(torch.tensor([1, 0, 1]))):
            got = cpu.decode(part, level)
            assert got is not None
            assert got.shape == part.shape
            assert relative(got, codec.decode_reference(part)) < FLOAT


def test_slices_and_selections_of_outliers_equal_the_reference(level: str) -> None:
    whole = make_pages(codec_of("outliers by vector"), 2, 2, [200], 64).pages[0]
    keys, values = (packed.select(torch.tensor([1, 1])).slice(13, 171) for packed in whole)
    pages = CompressedKV([(keys, values)])
    q = torch.randn(2, 4, 1, 64)
    assert (
        relative(cpu.attend(q, pages, AttendParams(0.1), level=level)[0], reference.attend(q, pages, AttendParams(0.1))[0])
        < FLOAT
    )


def test_threads_do_not_change_the_result() -> None:
    pages = make_pages(codec_of("hqmq:s96_r4_med3"), 1, 1, [1024, 1024, 333], 64)
    q = torch.randn(1, 2, 1, 64)
    wanted = reference.attend(q, pages, AttendParams(0.2))[0]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert relative(cpu.attend(q, pages, AttendParams(0.2))[0], wanted) < FLOAT
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("field", ["codes", "flags"])
def test_damaged_codes_and_flags_are_read_as_something_finite(level: str, field: str) -> None:
    """The damage is codes outside of the codebook, and flags of chunks that a vector of 36 numbers does not have."""
    codec = HQMQ(96, 4, 1e9, outlier_rule="vector")
    x = torch.randn(1, 1, 64, 36)
    keys, values = codec.encode(x, "key"), codec.encode(x)
    for packed in (keys, values):
        packed.tensors["flags"].zero_()
        packed.tensors[field].fill_(255)
        if field == "flags":
            packed.tensors["flags"][..., 0] = 0
            packed.tensors["flags"][..., 1] = 254  # the ninth chunk is the last
    out, lse = cpu.attend(torch.randn(1, 1, 1, 36), CompressedKV([(keys, values)]), AttendParams(0.1), level=level)
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()


def test_the_kernel_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = make_pages(codec_of("hqmq:s96_r4_med3"), 1, 1, [64], 64)
    monkeypatch.setattr(HQMQ, "decode_reference", lambda *_: pytest.fail("the definition ran"))
    dispatch.attend(torch.randn(1, 1, 1, 64), pages, AttendParams(0.1))
    pages.decode()
    with pytest.raises(pytest.fail.Exception, match="the definition ran"):
        dispatch.attend(torch.randn(1, 1, 1, 64), pages, AttendParams(0.1), backend="reference")
    monkeypatch.setattr(directions, "nearest_directions", lambda *_: pytest.fail("the definition ran"))
    codec_of("hqmq:s96_r4").encode(torch.randn(1, 1, 3, 64))


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("size", [1, 24, 170])
def test_search_finds_the_directions_of_the_reference(heads: int, size: int) -> None:
    books = torch.nn.functional.normalize(torch.randn(heads, size, 4), dim=-1)
    matrices = right_matrix(conjugate(books))
    chunks = torch.randn(2, 3, 37, 5, 4)
    codes, projections = dispatch.nearest_directions(chunks, matrices, backend="cpu")
    wanted, best = dispatch.nearest_directions(chunks, matrices, backend="reference")
    assert torch.allclose(projections, best, atol=1e-5)
    # Two directions may be equally near within rounding.
    assert (codes != wanted).float().mean() < 1e-2
    assert dispatch.nearest_directions(chunks[:, :, :0], matrices)[0].shape == (2, 3, 0, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 600, 64)
    wanted = HQMQ(25, 4, None, radius="chi").encode(x).decode()
    try:
        torch.set_default_dtype(dtype)
        got = HQMQ(25, 4, None, radius="chi").encode(x).decode()
        uniform = HQMQ(25, 3).encode(x).decode()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, wanted)
    assert torch.equal(uniform, HQMQ(25, 3).encode(x).decode())


def test_pages_of_other_codecs_roles_or_layers_are_refused() -> None:
    x = torch.randn(1, 1, 8, 64)
    codec = codec_of("hqmq:s24_r2")
    keys, values = codec.encode(x, "key"), codec.encode(x)
    with pytest.raises(ValueError, match=r"a page of values of layer 0, .* in hqmq:4 beside one of values .* in hqmq:s24_r2"):
        CompressedKV([(keys, values), (keys, codecs.get("hqmq:4").encode(x))])
    with pytest.raises(ValueError, match=r"a page of keys of layer 0, .* in hqmq:4 beside one of keys .* in hqmq:s24_r2"):
        CompressedKV([(keys, values), (codecs.get("hqmq:4").encode(x, "key"), values)])
    with pytest.raises(ValueError, match="beside one of"):
        CompressedKV([(keys, codec.encode(x, layer=1))])
    with pytest.raises(ValueError, match="are given as keys: encode them with the role 'key'"):
        CompressedKV([(values, values)])


def test_chunks_of_zeros_have_the_same_direction_everywhere() -> None:
    matrices = right_matrix(conjugate(torch.nn.functional.normalize(torch.randn(1, 24, 4), dim=-1)))
    chunks = torch.zeros(1, 1, 2, 3, 4)
    codes = [dispatch.nearest_directions(chunks, matrices, backend=name)[0] for name in ("cpu", "reference")]
    assert torch.equal(codes[0].long(), codes[1])
