"""Attention over packed tokens and encoding on Arm, run in an emulator, agree with their definition in PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import emulated
import pytest
import torch
from kernel_inputs import make_pages, random_codes, relative

from tessera import codecs
from tessera.codecs.codebooks import JOINT_BITS, joint
from tessera.codecs.hqmq_joint import JointHQMQ, words_of
from tessera.kernels import AttendParams, CompressedKV, reference
from tessera.kernels.bits import pack_bits

pytestmark = [pytest.mark.slow, pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))]

#: Maximum relative error of float32 sums in another order.
FLOAT = 1e-5
#: Tolerance of distances that count as equal: the rounding of float32 for the lengths of codewords.
TIE = 2e-6
LEVELS = ("portable", "neon", "dotprod")
BY_HAND = LEVELS[1:]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> emulated.Kernels:
    built = emulated.Kernels(tmp_path_factory.mktemp("kernels"))
    built.build()
    return built


def check(kernels: emulated.Kernels, q: torch.Tensor, pages: CompressedKV, params: AttendParams, level: str) -> None:
    out, lse = kernels.attend(q, pages, params, level)
    wanted, wanted_lse = reference.attend(q, pages, params)
    assert relative(out, wanted) < FLOAT
    assert torch.equal(lse == -torch.inf, wanted_lse == -torch.inf)
    seen = wanted_lse > -torch.inf
    assert torch.allclose(lse[seen], wanted_lse[seen], atol=1e-4, rtol=1e-5)


def test_the_kernels_are_chosen_by_what_the_processor_has(kernels: emulated.Kernels) -> None:
    assert kernels.levels() == ["portable", "neon", "dotprod"]
    assert kernels.levels("cortex-a53") == ["portable", "neon"]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("spec", ["hqmq:2", "hqmq:2.5", "hqmq:3", "hqmq:3.5", "hqmq:4"])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "queries", "sizes", "dim"),
    [
        (1, 4, 1, 1, [64], 64),
        (2, 4, 2, 1, [128, 320, 37], 128),
        (1, 6, 2, 3, [300, 1], 80),
        (2, 2, 2, 37, [192, 65], 96),
        (1, 3, 1, 2, [17], 256),
        (1, 4, 4, 2, [100], 4),
        (1, 10, 2, 1, [70], 20),
    ],
)
def test_attention_equals_the_reference(
    kernels: emulated.Kernels,
    level: str,
    spec: str,
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    sizes: list[int],
    dim: int,
) -> None:
    """Keys have a large constant channel, which centring removes, and a wide one."""
    pages = make_pages(codecs.get(spec), batch, kv_heads, sizes, dim)
    check(kernels, torch.randn(batch, heads, queries, dim), pages, AttendParams(dim**-0.5), level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("spec", ["hqmq:4.5", "hqmq:5"])
def test_attention_over_wide_codes_equals_the_reference(kernels: emulated.Kernels, level: str, spec: str) -> None:
    """Codewords of wide codes are read in two parts."""
    codec = codecs.get(spec)
    shape = (2, 2, 133, 96)
    pages = CompressedKV([(random_codes(codec, shape, "key"), random_codes(codec, shape, "value"))])
    check(kernels, torch.randn(2, 6, 3, 96), pages, AttendParams(0.01), level)


@pytest.mark.parametrize("level", LEVELS)
def test_keys_and_values_of_two_codecs_equal_the_reference(kernels: emulated.Kernels, level: str) -> None:
    k, v = torch.randn(2, 1, 2, 150, 64).unbind(0)
    pages = CompressedKV([(codecs.get("hqmq:3.5").encode(k, "key"), codecs.get("hqmq:2").encode(v))])
    check(kernels, torch.randn(1, 4, 1, 64), pages, AttendParams(0.125), level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", [3, 4, 4.5, 5])
def test_every_code_is_read_as_its_codeword(kernels: emulated.Kernels, level: str, bits: float) -> None:
    """Attention to a single token returns its value for any codes."""
    codec = JointHQMQ(bits, centre=False)
    codes = torch.randint(len(joint(codec.code_bits).codewords), (1, 16, 1, 128))
    tensors = {"codes": pack_bits(codes, codec.code_bits), "scale": torch.full((1, 16, 1), 131, dtype=torch.uint8)}
    values = codecs.Packed(codec, tensors, (1, 16, 1, 512), torch.float32)
    q = torch.randn(1, 16, 1, 512)
    out, lse = kernels.attend(q, CompressedKV([(replace(values, role="key"), values)]), AttendParams(0.5), level)
    assert relative(out, values.decode()) < FLOAT
    assert torch.allclose(lse, (q * replace(values, role="key").decode()).sum(-1) * 0.5, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "rule",
    [
        {"start": 0},
        {"start": 165, "window": 40},
        {"softcap": 2.0},
        {"mask": "rows"},
        {"mask": "heads"},
        {"mask": "all", "start": 160, "softcap": 5.0},
    ],
)
def test_masks_windows_and_caps_equal_the_reference(kernels: emulated.Kernels, level: str, rule: dict[str, Any]) -> None:
    pages = make_pages(codecs.get("hqmq:4"), 2, 2, [128, 64], 64)
    shapes = {"rows": (2, 1, 20, 192), "heads": (1, 4, 20, 192), "all": (2, 4, 20, 192)}
    rule = {name: torch.rand(shapes[value]) > 0.3 if name == "mask" else value for name, value in rule.items()}
    if "mask" in rule:
        rule["mask"][..., 3, :] = False  # a query that sees nothing
    check(kernels, torch.randn(2, 4, 20, 64), pages, AttendParams(0.2, **rule), level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("variant", [{"rotate": False}, {"centre": False}])
def test_slices_and_variants_equal_the_reference(kernels: emulated.Kernels, level: str, variant: dict[str, bool]) -> None:
    keys, values = make_pages(JointHQMQ(4, **variant), 1, 2, [200], 64).pages[0]
    check(
        kernels,
        torch.randn(1, 4, 1, 64),
        CompressedKV([(keys.slice(13, 171), values.slice(13, 171))]),
        AttendParams(0.1),
        level,
    )


@pytest.mark.parametrize("level", BY_HAND)
@pytest.mark.parametrize("spec", ["hqmq:2", "hqmq:3", "hqmq:4", "hqmq:5"])
@pytest.mark.parametrize("dim", [20, 64])
def test_specialised_kernels_run_where_they_should(kernels: emulated.Kernels, level: str, spec: str, dim: int) -> None:
    """Only specialised kernels write queries in limbs; in the portable loops two limbs equal three."""
    codec = codecs.get(spec)
    shape = (1, 2, 114, dim)
    pages = CompressedKV([(random_codes(codec, shape, "key"), random_codes(codec, shape, "value"))])
    q = torch.randn(1, 6, 1, dim)
    two, three = (kernels.attend(q, pages, AttendParams(0.1), level, limbs)[0] for limbs in (2, 3))
    assert not torch.equal(two, three)
    assert relative(two, three) < 1e-3
    plain = (kernels.attend(q, pages, AttendParams(0.1), "portable", limbs)[0] for limbs in (2, 3))
    assert torch.equal(*plain)


def test_the_kernels_are_two(kernels: emulated.Kernels) -> None:
    assert kernels.uses("DotForm::products", "sdot")
    assert kernels.uses("NeonForm::products", "smlal")
    assert not kernels.uses("NeonForm::products", "sdot")


@pytest.mark.parametrize(
    ("level", "limbs", "bound"),
    [("neon", 1, 2e-4), ("neon", 3, FLOAT), ("dotprod", 1, 1e-2), ("dotprod", 2, 2e-4), ("dotprod", 3, FLOAT)],
)
def test_limbs_bound_the_error(kernels: emulated.Kernels, level: str, limbs: int, bound: float) -> None:
    codec, (k, v) = codecs.get("hqmq:4"), torch.randn(2, 1, 2, 700, 128)
    pages = CompressedKV([(codec.encode(k, "key"), codec.encode(v))])
    q = torch.randn(1, 8, 1, 128)
    got = kernels.attend(q, pages, AttendParams(128**-0.5), level, limbs)[0]
    error = relative(got, reference.attend(q, pages, AttendParams(128**-0.5))[0])
    assert error < bound
    if limbs < 3:
        assert error > bound / 1000  # so that the argument has an effect


@pytest.mark.parametrize("level", BY_HAND)
@pytest.mark.parametrize("peak", [5.5, 6.4, 8.0])
def test_many_small_weights_beside_large_ones_are_not_lost(kernels: emulated.Kernels, level: str, peak: float) -> None:
    """In every block one token has far more weight than each of the many others."""
    k, v = torch.zeros(1, 1, 4096, 64), 1 + torch.randn(1, 1, 4096, 64)
    k[..., 0] = 1e-3 * torch.randn(4096)
    k[:, :, ::256, 0] = peak
    k[:, :, 0, 0] = 2 * peak
    codec = JointHQMQ(4, centre=False)
    pages = CompressedKV([(codec.encode(k, "key"), codec.encode(v))])
    q = torch.zeros(1, 1, 1, 64)
    q[..., 0] = 1
    got = kernels.attend(q, pages, AttendParams(1.0), level, limbs=2)[0]
    assert relative(got, reference.attend(q, pages, AttendParams(1.0))[0]) < 1e-3


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_query_gives_nan_and_harms_no_other(kernels: emulated.Kernels, level: str, bad: float) -> None:
    pages = make_pages(codecs.get("hqmq:4"), 1, 1, [64], 64)
    q = torch.randn(1, 2, 3, 64)
    sound = kernels.attend(q, pages, AttendParams(0.1), level)[0]
    q[0, 1, 2, 7] = bad
    out, lse = kernels.attend(q, pages, AttendParams(0.1), level)
    assert out[0, 1, 2].isnan().all()
    assert lse[0, 1, 2].isnan()
    out[0, 1, 2] = sound[0, 1, 2]
    assert torch.equal(out, sound)


def chunks(bits: int) -> torch.Tensor:
    """Draw chunks of every size, on planes where regions meet, at codewords, and between two of them."""
    book = joint(bits)
    n = max(40, min(1000, (1 << 24) >> bits))
    words = book.codewords[torch.randint(len(book.codewords), (2, n))].float() * book.step
    every, planes, near = torch.randn(3, n, 4)
    every[: n // 2] *= torch.logspace(-6, 4, n // 2)[:, None]
    planes[::3, 1] = planes[::3, 0]
    planes[1::3, 2] = -planes[1::3, 3]
    planes[2::3, 0] = planes[2::3, 1:].abs().sum(-1)
    return torch.cat((every, planes, near * 0.1, words[0], words.mean(0), torch.zeros(1, 4)))


@pytest.mark.parametrize("bits", JOINT_BITS)
def test_chunks_get_the_nearest_codeword(kernels: emulated.Kernels, bits: int) -> None:
    """No other codeword is nearer; and whole vectors, divided and packed, get the codes of their chunks."""
    x, book = chunks(bits), words_of(bits)
    scale = torch.rand(9) + 0.5
    scale[3] = 0
    vectors = torch.randn(9, 18)
    divided = torch.nn.functional.pad(vectors / scale.clamp(min=1e-30)[:, None], (0, 2))
    codes, words, packed = kernels.encode(torch.cat((x, divided.view(-1, 4))), vectors, scale, book, bits, "neon")
    of_vectors = codes[len(x) :].view(9, 5).clone()
    of_vectors[3] = 0
    assert torch.equal(packed, pack_bits(of_vectors, bits))

    codes, words = codes[: len(x)].long(), words[: len(x)]
    every = joint(bits).codewords.double() * book.step
    rows = every.T.contiguous()
    nearest = torch.stack([sum((w - c).square() for w, c in zip(rows, p, strict=True)).amin().sqrt() for p in x.double()])
    assert (((x.double() - every[codes]).norm(dim=-1) - nearest) / (1 + x.norm(dim=-1))).max() <= TIE
    assert torch.equal(words, joint(bits).codewords[codes].float() * book.step)


def test_the_search_looks_at_four_chunks_at_a_time(kernels: emulated.Kernels) -> None:
    """The portable search, as compiled for Arm, compares, selects and multiplies whole registers."""
    for instruction in ("fcmgt", "bsl", "fmla", "scvtf"):
        assert kernels.uses("search_block", instruction), instruction
    assert not kernels.uses("search_block", "none such")
