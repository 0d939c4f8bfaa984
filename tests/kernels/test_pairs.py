"""For pages with different codecs of keys and values, the C++ kernels agree with their definition."""

from __future__ import annotations

import warnings
from functools import partial
from itertools import permutations
from typing import Any

import pytest
import torch
from kernel_inputs import NoKernel, make_pages, random_codes, relative
from torch import Tensor

from tessera import codecs
from tessera.codecs.base import Role
from tessera.codecs.hqmq import HQMQ
from tessera.codecs.hqmq_joint import JointHQMQ
from tessera.codecs.pair import Pair, pair
from tessera.kernels import AttendParams, CompressedKV, cpu, dispatch, reference
from tessera.kernels.joint import JointFormat
from tessera.kernels.products import ProductFormat
from tessera.kernels.scalars import ScalarFormat

built = pytest.mark.skipif(cpu.MISSING is not None, reason=str(cpu.MISSING))

#: Maximum relative error of float32 sums in another order.
FLOAT = 1e-5
BITS = (2, 2.5, 3, 3.5, 4, 4.5, 5)
#: Joint codebooks of different sizes and settings, codes of direction and radius, and mixtures.
SPECS = (
    "hqmq:k4v3",
    "hqmq:k2v3.5",
    "(k=hqmq:4_norot,v=hqmq:3_nocentre)",
    "(k=hqmq:3_nocentre,v=hqmq:4)",
    "(k=hqmq:s24_r2,v=hqmq:3)",
    "(k=hqmq:4,v=hqmq:s192_r6_med3)",
    "(k=hqmq:s96_r4_med3,v=hqmq:o170_r4)",
)

#: With three limbs the queries are as exact as float32 sums.
attend = partial(cpu.attend, limbs=3)


@pytest.fixture(params=cpu.levels())
def level(request: pytest.FixtureRequest) -> str:
    return request.param


def defined(q: Tensor, pages: CompressedKV, scale: float, **rule: Any) -> tuple[Tensor, Tensor]:
    """Compute `reference.attend`, decoding by the definition, so that it does not share the kernel's mistakes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESSERA_BACKEND", "reference")
        return reference.attend(q, pages, AttendParams(scale, **rule))


def equals_the_reference(level: str, q: Tensor, pages: CompressedKV, scale: float, **rule: Any) -> None:
    out, lse = attend(q, pages, AttendParams(scale, **rule), level=level)
    wanted, wanted_lse = defined(q, pages, scale, **rule)
    assert relative(out, wanted) < FLOAT
    assert torch.equal(lse == -torch.inf, wanted_lse == -torch.inf)
    seen = wanted_lse > -torch.inf
    assert torch.allclose(lse[seen], wanted_lse[seen], atol=1e-4, rtol=1e-5)


@built
@pytest.mark.parametrize("bits", list(permutations(BITS, 2)), ids=lambda bits: f"k{bits[0]}v{bits[1]}")
def test_all_bits_beside_all_others_equal_the_reference(level: str, bits: tuple[float, float]) -> None:
    """Random codes avoid the cost of encoding."""
    codec = codecs.get(f"hqmq:k{bits[0]}v{bits[1]}")
    pages = CompressedKV(
        [(random_codes(codec, (2, 2, n, 80), "key"), random_codes(codec, (2, 2, n, 80), "value")) for n in (128, 37)]
    )
    equals_the_reference(level, torch.randn(2, 6, 3, 80), pages, 0.02, start=161, window=140)


@built
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "queries", "sizes", "dim"),
    [
        (1, 4, 1, 1, [64], 64),
        (2, 4, 2, 1, [128, 320, 37], 128),
        (1, 6, 2, 3, [300, 1], 80),
        (1, 2, 1, 70, [90], 36),
        (1, 4, 4, 2, [100], 4),
    ],
)
def test_attention_equals_the_reference(
    level: str, spec: str, batch: int, heads: int, kv_heads: int, queries: int, sizes: list[int], dim: int
) -> None:
    pages = make_pages(codecs.get(spec), batch, kv_heads, sizes, dim)
    equals_the_reference(level, torch.randn(batch, heads, queries, dim), pages, dim**-0.5)


@built
@pytest.mark.parametrize("spec", ["hqmq:k4v3", "hqmq:k3v4", "(k=hqmq:s96_r4_med3,v=hqmq:3)"])
@pytest.mark.parametrize(
    "rule",
    [{"start": 150}, {"start": 165, "window": 40}, {"softcap": 2.0}, {"mask": (2, 1)}, {"mask": (1, 4), "start": 170}],
    ids=str,
)
def test_masks_windows_and_caps_equal_the_reference(level: str, spec: str, rule: dict[str, Any]) -> None:
    pages = make_pages(codecs.get(spec), 2, 2, [128, 64], 64)
    rule = {**rule, "mask": torch.rand(*rule["mask"], 20, 192) > 0.3} if "mask" in rule else rule
    equals_the_reference(level, torch.randn(2, 4, 20, 64), pages, 0.2, **rule)


@built
@pytest.mark.parametrize("spec", ["hqmq:k4v3", "(k=hqmq:3_nocentre,v=hqmq:4)", "(k=hqmq:4,v=hqmq:s24_r3_med3)"])
def test_slices_that_begin_inside_a_group_equal_the_reference(level: str, spec: str) -> None:
    keys, values = make_pages(codecs.get(spec), 2, 2, [200], 64).pages[0]
    cuts = [(13, 70), (70, 70), (70, 171)]
    pages = CompressedKV([(keys.slice(a, b), values.slice(a, b)) for a, b in cuts])
    equals_the_reference(level, torch.randn(2, 4, 2, 64), pages, 0.1)


@built
@pytest.mark.parametrize("spec", ["hqmq:k4v3", "(k=hqmq:s24_r2,v=hqmq:3)", "(k=hqmq:3,v=hqmq:s24_r2)"])
def test_the_kernel_is_what_runs(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = make_pages(codecs.get(spec), 1, 1, [64], 64)
    for codec in (JointHQMQ, HQMQ):
        monkeypatch.setattr(codec, "decode_reference", lambda *_: pytest.fail("the definition ran"))
    monkeypatch.setattr(reference, "attend", lambda *_, **__: pytest.fail("the definition ran"))
    dispatch.attend(torch.randn(1, 1, 1, 64), pages, AttendParams(0.1))
    pages.decode()


@pytest.mark.parametrize("roles", [("key", "value"), ("value", "key")])
def test_where_one_has_no_kernel_the_definition_runs_without_a_word(roles: tuple[Role, Role]) -> None:
    coders = dict(zip(roles, (NoKernel(), codecs.get("hqmq:3")), strict=True))
    pages = make_pages(pair(coders["key"], coders["value"]), 1, 2, [128, 30], 64)
    q = torch.randn(1, 4, 2, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, lse = dispatch.attend(q, pages, AttendParams(0.1, start=150))
    wanted, wanted_lse = defined(q, pages, 0.1, start=150)
    assert relative(out, wanted) < FLOAT
    assert torch.allclose(lse, wanted_lse, atol=1e-4)
    if cpu.MISSING is None:
        with pytest.raises(ValueError, match="backend 'cpu' cannot run: there is no kernel for no-kernel"):
            dispatch.attend(q, pages, AttendParams(0.1), backend="cpu")
    with pytest.raises(ValueError, match="there is no kernel for no-kernel"):
        pages.check(q, AttendParams(0.1))


def test_pages_know_the_formats_of_keys_and_of_values() -> None:
    x, q = torch.randn(1, 1, 64, 32), torch.randn(1, 2, 1, 32)
    for key, value, kinds in (
        ("hqmq:4", "hqmq:3", (JointFormat, JointFormat)),
        ("hqmq:s24_r2", "hqmq:3", (ProductFormat, JointFormat)),
        ("hqmq:4", "hqmq:4", (JointFormat, JointFormat)),
        ("q8_0", "hqmq:3", (ScalarFormat, JointFormat)),
    ):
        pages = CompressedKV([(codecs.get(key).encode(x, "key"), codecs.get(value).encode(x, "value"))])
        assert tuple(codec.spec for codec in pages.codecs) == (key, value)
        assert tuple(map(type, pages.form())) == kinds
        assert (
            pages.check(q, AttendParams(0.1))
            == pages.form()
            == (pages.codecs[0].kernel_format(32), pages.codecs[1].kernel_format(32))
        )
    pages = CompressedKV([(NoKernel().encode(x, "key"), codecs.get("hqmq:3").encode(x, "value"))])
    assert pages.form()[0] is None
    assert pages.form()[1] is codecs.get("hqmq:3").kernel_format(32)


def test_pages_of_other_codecs_than_the_first_are_refused() -> None:
    x = torch.randn(1, 1, 64, 32)
    codec = codecs.get("hqmq:k4v3")
    assert isinstance(codec, Pair)
    first = codec.encode(x, "key"), codec.encode(x, "value")
    before = CompressedKV([first])
    for keys, values, words in (
        (codec.value.encode(x, "key"), first[1], "keys of layer 0, .* in hqmq:3 beside one of keys .* in hqmq:4"),
        (first[0], codec.key.encode(x, "value"), "values of layer 0, .* in hqmq:4 beside one of values .* in hqmq:3"),
        (first[0], codec.encode(x, "value", 1), "values of layer 1, .* beside one of keys of layer 0"),
    ):
        with pytest.raises(ValueError, match=f"a page of {words}"):
            CompressedKV([first, (keys, values)], before)
    with pytest.raises(ValueError, match="values of layer 1"):
        CompressedKV([(first[0], codec.encode(x, "value", 1))])
    assert CompressedKV([first, first], before).tokens == 128
