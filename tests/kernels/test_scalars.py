"""The C++ kernels for the scalar baselines agree with their definition in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kernel_inputs import make_pages, relative
from torch import Tensor

from tessera import codecs
from tessera.codecs import Codec
from tessera.kernels import AttendParams, CompressedKV, cpu, dispatch, reference

pytestmark = pytest.mark.skipif(cpu.MISSING is not None, reason=str(cpu.MISSING))

#: Maximum relative error of float32 sums in another order.
FLOAT = 1e-5
#: All scalar codecs at every number of bits.
SPECS = (
    *("q4_0", "q4_0:norot", "q8_0", "fp8", "fp8:scaled"),
    *(f"int:{bits}" for bits in range(2, 9)),
    *(f"kivi:{bits}" for bits in range(2, 9)),
    *(f"scalar:{bits}" for bits in range(2, 7)),
)
#: One of each form, for tests that do not depend on the bits.
FORMS = ("q4_0", "q8_0", "int:3", "kivi:3", "scalar:3", "fp8:scaled")
#: Keys of one form with values of another.
MIXED = (
    "(k=q8_0,v=hqmq:3)",
    "(k=hqmq:4,v=kivi:2)",
    "(k=kivi:2,v=scalar:5)",
    "(k=hqmq:s24_r2,v=int:4)",
    "(k=fp8,v=hqmq:s96_r4)",
)


@pytest.fixture(params=cpu.levels())
def level(request: pytest.FixtureRequest) -> str:
    return request.param


def by_definition(run: Callable[[], Any]) -> Any:
    """Call a function with all kernels disabled, so that the reference does not share their mistakes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESSERA_BACKEND", "reference")
        return run()


def equals_the_reference(level: str, q: Tensor, pages: CompressedKV, params: AttendParams) -> None:
    out, lse = cpu.attend(q, pages, params, level=level, limbs=3)
    wanted, wanted_lse = by_definition(lambda: reference.attend(q, pages, params))
    assert relative(out, wanted) < FLOAT
    assert torch.equal(lse == -torch.inf, wanted_lse == -torch.inf)
    seen = wanted_lse > -torch.inf
    assert torch.allclose(lse[seen], wanted_lse[seen], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "queries", "sizes", "dim"),
    [
        (2, 4, 2, 1, [128, 320, 37], 128),
        (1, 6, 2, 3, [300, 1], 80),
        (1, 3, 3, 2, [100], 4),
        (1, 2, 1, 70, [90], 36),
    ],
)
def test_attention_equals_the_reference(
    level: str, spec: str, batch: int, heads: int, kv_heads: int, queries: int, sizes: list[int], dim: int
) -> None:
    pages = make_pages(codecs.get(spec), batch, kv_heads, sizes, dim)
    equals_the_reference(level, torch.randn(batch, heads, queries, dim), pages, AttendParams(dim**-0.5))


@pytest.mark.parametrize("spec", [*FORMS, *MIXED])
@pytest.mark.parametrize(
    "rule",
    [{"start": 150}, {"start": 165, "window": 40}, {"softcap": 2.0}, {"mask": (2, 1)}, {"mask": (1, 4), "start": 170}],
    ids=str,
)
def test_masks_windows_and_caps_equal_the_reference(level: str, spec: str, rule: dict[str, Any]) -> None:
    pages = make_pages(codecs.get(spec), 2, 2, [128, 64], 64)
    rule = {**rule, "mask": torch.rand(*rule["mask"], 20, 192) > 0.3} if "mask" in rule else rule
    equals_the_reference(level, torch.randn(2, 4, 20, 64), pages, AttendParams(0.2, **rule))


@pytest.mark.parametrize("spec", [*FORMS, *MIXED])
@pytest.mark.parametrize("dim", [4, 36, 80, 128, 512])
def test_keys_and_values_of_any_codecs_equal_the_reference(level: str, spec: str, dim: int) -> None:
    pages = make_pages(codecs.get(spec), 1, 2, [128, 70], dim)
    equals_the_reference(level, torch.randn(1, 6, 1, dim), pages, AttendParams(dim**-0.5))


def cuts(codec: Codec) -> Iterator[CompressedKV]:
    keys, values = make_pages(codec, 2, 2, [200], 64).pages[0]
    yield CompressedKV([(keys.slice(a, b), values.slice(a, b)) for a, b in [(13, 70), (70, 70), (70, 171)]])
    rows = torch.tensor([1, 0, 1])
    yield CompressedKV([(keys.select(rows).slice(45, 111), values.select(rows).slice(45, 111))])


@pytest.mark.parametrize("spec", [*FORMS, *MIXED])
def test_slices_that_begin_inside_a_group_and_selected_rows_equal_the_reference(level: str, spec: str) -> None:
    for pages in cuts(codecs.get(spec)):
        equals_the_reference(level, torch.randn(pages.shape[0], 4, 2, 64), pages, AttendParams(0.1))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("tokens", "dim"), [(200, 64), (65, 80), (33, 36), (3, 512), (1, 4), (0, 64)])
def test_decoding_equals_the_definition(level: str, spec: str, tokens: int, dim: int) -> None:
    codec = codecs.get(spec)
    for packed in make_pages(codec, 2, 2, [tokens], dim).pages[0]:
        for part in (packed, packed.slice(13, 150), packed.select(torch.tensor([1, 0, 1]))):
            got = cpu.decode(part, level)
            assert got.shape == part.shape
            assert relative(got, codec.decode_reference(part)) < FLOAT


@pytest.mark.parametrize("spec", ["fp8", "fp8:scaled"])
def test_every_number_of_eight_bits_is_read(level: str, spec: str) -> None:
    codec = codecs.get(spec)
    packed = codec.encode(torch.ones(1, 1, 2, 128), "value")
    codes = torch.arange(256, dtype=torch.uint8)
    codes = torch.where(codes & 127 == 127, 0, codes)  # NaN is never written
    packed.tensors["codes"].copy_(codes.view(1, 1, 2, 128))
    assert relative(cpu.decode(packed, level), codec.decode_reference(packed)) < 1e-6


@pytest.mark.parametrize("spec", FORMS)
def test_vectors_of_zeros_and_of_the_largest_numbers_are_read(level: str, spec: str) -> None:
    codec, x = codecs.get(spec), torch.randn(1, 2, 70, 64)
    x[:, :, 3] = 0
    x[:, :, 5] *= 1e5
    pages = CompressedKV([(codec.encode(x / 1e3, "key"), codec.encode(x, "value"))])
    equals_the_reference(level, torch.randn(1, 2, 1, 64), pages, AttendParams(0.01))


@pytest.mark.parametrize("spec", [*FORMS, *MIXED])
def test_the_kernels_are_what_runs(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = make_pages(codecs.get(spec), 1, 1, [64], 64)
    for codec in {type(packed.codec) for packed in pages.pages[0]}:
        monkeypatch.setattr(codec, "decode_reference", lambda *_: pytest.fail("the definition ran"))
    monkeypatch.setattr(reference, "attend", lambda *_: pytest.fail("the definition ran"))
    dispatch.attend(torch.randn(1, 1, 1, 64), pages, AttendParams(0.1))
    pages.decode()
    monkeypatch.setenv("TESSERA_BACKEND", "reference")
    with pytest.raises(pytest.fail.Exception, match="the definition ran"):
        dispatch.attend(torch.randn(1, 1, 1, 64), pages, AttendParams(0.1))


def test_threads_do_not_change_the_result() -> None:
    pages = make_pages(codecs.get("kivi:3"), 1, 1, [1024, 1024, 333], 64)
    q, params = torch.randn(1, 2, 1, 64), AttendParams(0.2)
    wanted = by_definition(lambda: reference.attend(q, pages, params))[0]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert relative(cpu.attend(q, pages, params)[0], wanted) < FLOAT
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("spec", FORMS)
def test_queries_that_are_not_finite_or_have_an_odd_head_dim_give_what_the_definition_gives(level: str, spec: str) -> None:
    """A query that is not finite gives NaN in its own row only; a head_dim not divisible by four uses PyTorch."""
    pages = make_pages(codecs.get(spec), 1, 1, [64], 64)
    q = torch.randn(1, 2, 1, 64)
    q[0, 1, 0, 0] = torch.nan
    out, lse = cpu.attend(q, pages, AttendParams(0.1), level=level)
    assert out[0, 0].isfinite().all()
    assert out[0, 1].isnan().all()
    assert lse.isnan().tolist() == [[[False], [True]]]
    odd = make_pages(codecs.get(spec), 1, 1, [64], 18)
    assert cpu.attend_refusal(torch.randn(1, 1, 1, 18), odd) == "head_dim 18 is no multiple of 4 up to 512"
    out, _ = dispatch.attend(torch.randn(1, 1, 1, 18), odd, AttendParams(0.1))
    assert out.isfinite().all()


def test_damaged_codes_are_read_as_something_finite(level: str) -> None:
    for spec in SPECS:
        if not spec.startswith("q"):  # a block's bytes include its scale
            keys, values = make_pages(codecs.get(spec), 1, 1, [37], 36).pages[0]
            for packed in (keys, values):
                packed.tensors["codes"].fill_(255)
            out, _ = cpu.attend(torch.randn(1, 1, 1, 36), CompressedKV([(keys, values)]), AttendParams(0.1), level=level)
            assert torch.isfinite(out).all()
