"""The Triton kernels agree with their definition, on a GPU if there is one, otherwise interpreted on small shapes."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from kernel_inputs import make_pages, random_codes, relative
from triton_checks import DEVICE, HALF, check, moved

from tessera import codecs
from tessera.codecs.codebooks import joint
from tessera.codecs.hqmq_joint import JointHQMQ, words_of
from tessera.kernels import AttendParams, CompressedKV, dispatch, reference, triton
from tessera.kernels.triton.formats import LOOKUPS

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize("spec", ["hqmq:2", "hqmq:2.5", "hqmq:3", "hqmq:3.5", "hqmq:4", "hqmq:4.5", "hqmq:5"])
def test_attention_equals_the_reference(spec: str) -> None:
    check(codecs.get(spec), (1, 4, 2, 1), [64, 65], 64)


@pytest.mark.parametrize(("key", "value"), list(permutations((2, 3, 3.5, 4, 5), 2)))
def test_keys_beside_values_of_other_bits_equal_the_reference(key: float, value: float) -> None:
    """Random codes avoid the cost of encoding."""
    codec = codecs.get(f"hqmq:k{key}v{value}")
    pages = CompressedKV(
        [(random_codes(codec, (1, 2, n, 80), "key"), random_codes(codec, (1, 2, n, 80), "value")) for n in (64, 21)]
    )
    q = torch.randn(1, 4, 2, 80)
    out, lse = triton.attend(q.to(DEVICE), moved(pages), AttendParams(0.02, start=70))
    wanted, wanted_lse = reference.attend(q, pages, AttendParams(0.02, start=70))
    assert relative(out.cpu(), wanted) < HALF
    assert torch.allclose(lse.cpu(), wanted_lse, atol=2e-2, rtol=1e-3)


@pytest.mark.parametrize(
    "spec", ["hqmq:k4v3", "hqmq:k3v4", "(k=hqmq:4_norot,v=hqmq:3_nocentre)", "(k=hqmq:3_nocentre,v=hqmq:4)"]
)
@pytest.mark.parametrize(
    ("shape", "sizes", "dim", "rule"),
    [
        ((2, 2, 1, 3), [100], 80, {}),
        ((1, 3, 1, 7), [64, 5], 20, {"start": 66, "window": 30}),
        ((1, 2, 2, 1), [70], 128, {"softcap": 2.0, "splits": 2}),
        ((1, 2, 1, 2), [70], 64, {"mask": torch.arange(140).view(1, 1, 2, 70) % 3 > 0, "lookup": "moves"}),
    ],
    ids=["rows", "window", "cap", "mask"],
)
def test_odd_shapes_of_keys_and_values_apart_equal_the_reference(
    spec: str, shape: tuple[int, int, int, int], sizes: list[int], dim: int, rule: dict[str, Any]
) -> None:
    check(codecs.get(spec), shape, sizes, dim, **rule)


@pytest.mark.parametrize("lookup", LOOKUPS)
@pytest.mark.parametrize("spec", ["hqmq:2", "hqmq:3.5", "hqmq:4"])
def test_every_lookup_equals_the_reference(spec: str, lookup: str) -> None:
    check(codecs.get(spec), (1, 4, 2, 1), [70], 64, lookup=lookup)


@pytest.mark.parametrize("lookup", ["signs", "halves"])
def test_points_wider_than_bytes_are_looked_up(lookup: str) -> None:
    check(codecs.get("hqmq:5"), (1, 2, 1, 1), [70], 64, lookup=lookup)


def test_points_that_shared_memory_does_not_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="shared memory holds up to 2048 points of bytes; a code of 20 bits has 32768"):
        check(codecs.get("hqmq:5"), (1, 1, 1, 1), [64], 64, lookup="held")


def test_a_lookup_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="no lookup 'texture'; there are moves, held, signs, halves"):
        check(codecs.get("hqmq:4"), (1, 1, 1, 1), [64], 64, lookup="texture")


@pytest.mark.parametrize(
    ("shape", "sizes", "dim"),
    [
        ((2, 2, 1, 3), [100], 80),
        ((1, 3, 1, 7), [64, 5], 96),
        ((1, 2, 2, 1), [130], 128),
        ((1, 2, 1, 40), [70], 20),
        ((1, 2, 1, 2), [40], 256),
    ],
)
def test_odd_shapes_equal_the_reference(shape: tuple[int, int, int, int], sizes: list[int], dim: int) -> None:
    check(codecs.get("hqmq:4"), shape, sizes, dim)


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_splits_do_not_change_the_result(splits: int) -> None:
    check(codecs.get("hqmq:4"), (1, 2, 1, 1), [192, 50], 64, splits=splits)


@pytest.mark.parametrize("variant", [{"rotate": False}, {"centre": False}])
def test_without_rotation_or_centre(variant: dict[str, bool]) -> None:
    check(JointHQMQ(4, **variant), (1, 2, 1, 2), [100], 64)


@pytest.mark.parametrize("rule", [{"start": 60}, {"start": 90, "window": 30}, {"softcap": 2.0}, {"start": 130, "softcap": 9.0}])
def test_positions_windows_and_caps(rule: dict[str, Any]) -> None:
    check(codecs.get("hqmq:3"), (2, 4, 2, 5), [64, 64], 64, **rule)


@pytest.mark.parametrize("shape", [(2, 1, 5, 128), (1, 4, 5, 128), (1, 1, 5, 128)])
def test_masks(shape: tuple[int, ...]) -> None:
    check(codecs.get("hqmq:4"), (2, 4, 2, 5), [64, 64], 64, mask=torch.rand(shape) > 0.4)


def test_pages_that_begin_inside_a_group_and_pages_of_nothing() -> None:
    codec = codecs.get("hqmq:4")
    k, v = torch.randn(2, 2, 2, 200, 80).unbind(0)
    k[..., 1] *= 30
    keys, values = codec.encode(k, "key"), codec.encode(v)
    cuts = [(0, 0), (5, 70), (70, 131), (140, 140), (150, 200)]
    pages = CompressedKV([(keys.slice(a, b), values.slice(a, b)) for a, b in cuts])
    q = torch.randn(2, 4, 3, 80)
    out, lse = triton.attend(q.to(DEVICE), moved(pages), AttendParams(0.1, start=170, window=150))
    wanted, wanted_lse = reference.attend(q, pages, AttendParams(0.1, start=170, window=150))
    assert relative(out.cpu(), wanted) < HALF
    assert torch.allclose(lse.cpu(), wanted_lse, atol=2e-2, rtol=1e-3)
    out, lse = triton.attend(q.to(DEVICE), moved(CompressedKV(pages.pages[:1])), AttendParams(0.1))
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_a_narrowed_channel_that_the_query_hardly_has_does_not_cost_the_others_their_digits() -> None:
    codec = codecs.get("hqmq:4")
    k, v = torch.randn(2, 1, 1, 64, 64).unbind(0)
    k[..., 1] *= 30000
    q = torch.randn(1, 1, 2, 64)
    q[..., 1] *= 1e-6
    pages = CompressedKV([(codec.encode(k, "key"), codec.encode(v))])
    out, _ = triton.attend(q.to(DEVICE), moved(pages), AttendParams(0.3))
    assert relative(out.cpu(), reference.attend(q, pages, AttendParams(0.3))[0]) < HALF


@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("spec", ["hqmq:2", "hqmq:2.5", "hqmq:3", "hqmq:3.5", "hqmq:4", "hqmq:5"])
def test_vectors_decode_as_the_codec_defines(spec: str, role: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = codecs.get(spec)
    assert isinstance(codec, JointHQMQ)
    x = torch.randn(2, 3, 150, 80)
    x[..., 1] *= 30
    x[0, 1, 7] = 0
    packed = codec.encode(x, role).slice(5, 141)  # begins inside a group, and ends there
    ran = []
    real = triton.decode
    monkeypatch.setattr(triton, "decode", lambda packed: ran.append(packed) or real(packed))
    got = dispatch.decode(packed.to(DEVICE), backend="triton")
    assert ran
    assert got is not None
    assert relative(got.cpu(), codec.decode_reference(packed)) < 1e-5


def test_parts_are_merged_as_defined() -> None:
    parts = [(torch.randn(2, 3, 5, 20), torch.randn(2, 3, 5)) for _ in range(3)]
    parts[1][1][0] = -torch.inf
    for _, lse in parts:
        lse[1, 2] = -torch.inf
    there = [(out.to(DEVICE), lse.to(DEVICE)) for out, lse in parts]
    out, lse = dispatch.merge(there, backend="triton")
    wanted, wanted_lse = reference.merge(parts)
    assert torch.allclose(out.cpu(), wanted, atol=1e-6)
    assert torch.allclose(lse.cpu(), wanted_lse, atol=1e-6)


def test_what_sees_nothing_is_zero() -> None:
    pages = make_pages(codecs.get("hqmq:4"), 1, 1, [64], 64)
    mask = torch.zeros(1, 1, 1, 64, dtype=torch.bool, device=DEVICE)
    out, lse = triton.attend(torch.randn(1, 2, 1, 64, device=DEVICE), moved(pages), AttendParams(1.0, mask))
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_the_dispatcher_takes_it_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    real = triton.attend
    monkeypatch.setattr(triton, "attend", lambda *a, **k: (ran.append(1), real(*a, **k))[1])
    pages = moved(make_pages(codecs.get("hqmq:4"), 1, 1, [64], 64))
    q = torch.randn(1, 1, 1, 64, device=DEVICE)
    dispatch.attend(q, pages, AttendParams(0.1), backend="triton")
    dispatch.attend(q, pages, AttendParams(0.1))
    assert len(ran) == (2 if DEVICE == "cuda" else 1)
    dispatch.attend(q, moved(make_pages(codecs.get("hqmq:k4v3"), 1, 1, [64], 64)), AttendParams(0.1), backend="triton")
    assert len(ran) == (3 if DEVICE == "cuda" else 2)
    for spec, lacking in (("hqmq:s24_r2", "hqmq:s24_r2"), ("(k=hqmq:4,v=hqmq:s24_r2)", "hqmq:s24_r2")):
        with pytest.raises(ValueError, match=f"no Triton kernel for {lacking}"):
            dispatch.attend(q, moved(make_pages(codecs.get(spec), 1, 1, [64], 64)), AttendParams(0.1), backend="triton")


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_search_finds_the_codes_of_the_reference(bits: int) -> None:
    book, words = joint(bits), words_of(bits)
    x = torch.randn(700, 4)
    x[:50] *= torch.logspace(-5, 2, 50)[:, None]
    x[50:60] = 0
    x[60:70, 1:3] = 0
    got = dispatch.nearest(x.to(DEVICE), words, backend="triton").cpu()
    wanted = dispatch.nearest(x, words, backend="reference")
    points = book.codewords.float() * book.step
    # Two codewords may be equally near within rounding.
    assert (got != wanted).float().mean() < 5e-2
    assert ((x - points[got]).norm(dim=-1) - (x - points[wanted]).norm(dim=-1)).abs().max() < 1e-5 * x.abs().max()


def test_search_with_feedback_is_that_of_the_reference() -> None:
    """This includes vectors so long, or so close to zero, that the index does not cover them."""
    book = words_of(12)
    y, matrix = torch.randn(2, 5, 16), torch.randn(2, 16, 16).mul(0.1).triu(1)
    y[0, 0], y[1, 1] = 40 * y[0, 0], 0
    got = dispatch.encode_feedback(y.to(DEVICE), matrix.to(DEVICE), book, backend="triton").cpu()
    wanted = dispatch.encode_feedback(y, matrix, book, backend="reference")
    assert (got != wanted).float().mean() < 5e-2


def test_search_for_packed_codes_gives_zeros_for_vectors_of_zeros() -> None:
    book, x = words_of(8), torch.randn(6, 8)
    x[2] = 0
    scale = x.norm(dim=-1) / 8**0.5
    got = dispatch.pack_nearest(x.to(DEVICE), scale.to(DEVICE), book, 8, backend="triton").cpu()
    wanted = dispatch.pack_nearest(x, scale, book, 8, backend="reference")
    assert (got != wanted).float().mean() < 0.1
    assert not got[2].any()
    assert not wanted[2].any()


def test_search_of_nothing() -> None:
    assert dispatch.nearest(torch.zeros(0, 4, device=DEVICE), words_of(8), backend="triton").shape == (0,)
