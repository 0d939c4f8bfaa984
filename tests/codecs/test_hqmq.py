"""The paper's HQMQ agrees with its definition, and so do its variants."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from codec_fixtures import ROLES, agreement, gaussian, nmse
from quaternion_oracle import hurwitz_units, product
from torch import Tensor

from tessera.codecs import HQMQ, Packed, Role, get
from tessera.codecs.codebooks import DIRECTION_SIZES, optimised_secondary
from tessera.codecs.hqmq import PAPER, chi_levels


def oracle(
    x: Tensor, books: Tensor, radius_bits: int, outliers: Tensor | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decode by the paper's definition in float64, comparing every codeword.

    Args:
        x: (batch, heads, tokens, d).
        books: (heads, S, 4).
        radius_bits: b_r.
        outliers: (batch, heads, tokens, chunks) bool, chunks that are stored unquantised.

    Returns:
        The expected decoded chunks, (batch, heads, tokens, n, 4); which chunks are not nearly tied between two codewords or
        of two radius levels; and the radii.
    """
    batch, heads, tokens, dim = x.shape
    chunks = np.zeros((batch, heads, tokens, -(-dim // 4) * 4))
    chunks[..., :dim] = x.double().numpy()
    chunks = chunks.reshape(batch, heads, tokens, -1, 4)
    radii = np.linalg.norm(chunks, axis=-1)
    expected, sure = np.zeros_like(chunks), np.ones(radii.shape, bool)
    for head in range(heads):
        words = product(hurwitz_units()[:, None], books[head].double().numpy()[None]).reshape(-1, 4)
        for b, t in itertools.product(range(batch), range(tokens)):
            sigma = float(np.float16(radii[b, head, t].max()))
            for n, r in enumerate(radii[b, head, t]):
                inner = words @ chunks[b, head, t, n]
                first, second = np.sort(inner)[[-1, -2]]
                level = r * (2**radius_bits - 1) / sigma
                expected[b, head, t, n] = round(level) / (2**radius_bits - 1) * sigma * words[inner.argmax()]
                sure[b, head, t, n] = first - second > 1e-5 * r and abs(level % 1 - 0.5) > 1e-4
    if outliers is not None:
        kept = chunks.astype(np.float16).astype(np.float64)
        expected = np.where(outliers.numpy()[..., None], kept, expected)
    return expected, sure, radii


def in_chunks(y: Tensor) -> np.ndarray:
    """Split (..., d) into (..., n, 4), padded with zeros."""
    return torch.nn.functional.pad(y, (0, -y.shape[-1] % 4)).unflatten(-1, (-1, 4)).double().numpy()


def with_outliers(*shape: int) -> Tensor:
    """Draw Gaussian vectors in which one chunk in fifty is twenty times as large."""
    chunks = torch.randn(*shape).unflatten(-1, (-1, 4))
    chunks[torch.rand(chunks.shape[:-1]) < 0.02] *= 20
    return chunks.flatten(-2)


def flags_of(packed_flags: Tensor, chunks: int) -> Tensor:
    """Read the bitmap bit by bit."""
    return torch.from_numpy(np.unpackbits(packed_flags.numpy(), axis=-1, bitorder="little"))[..., :chunks].bool()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", ["s24_r2", "s24_r3", "s48_r4", "s96_r4", "s192_r6"])
def test_decoding_an_encoding_is_the_papers_definition(name: str, role: Role) -> None:
    codec = HQMQ.paper(name, seed=5)
    x = gaussian(2, 3, 9, 24) * torch.logspace(-1, 1, 9)[:, None]
    y = codec.encode(x, role, layer=3).decode()
    expected, sure, _ = oracle(x, codec.secondaries(3, role, 3), codec.radius_bits)
    assert sure.mean() > 0.99
    np.testing.assert_allclose(in_chunks(y)[sure], expected[sure], rtol=2e-6, atol=2e-6 * float(x.abs().max()))


@pytest.mark.parametrize("dim", [1, 6, 23])
def test_a_vector_is_filled_up_with_zeros_that_are_dropped(dim: int) -> None:
    codec = HQMQ.paper("s24_r4")
    x = gaussian(1, 2, 40, dim)
    y = codec.encode(x).decode()
    expected, sure, _ = oracle(x, codec.secondaries(2, "value", 0), 4)
    whole = expected.reshape(1, 2, 40, -1)[..., :dim]
    clear = np.repeat(sure, 4, axis=-1)[..., :dim]
    np.testing.assert_allclose(y.double().numpy()[clear], whole[clear], rtol=2e-6, atol=1e-5)


def test_a_given_codebook_is_used_as_it_is() -> None:
    x = gaussian(1, 3, 20, 16)
    shared = torch.nn.functional.normalize(torch.randn(30, 4), dim=-1)
    each = torch.nn.functional.normalize(torch.randn(3, 30, 4), dim=-1)
    for book, books in ((shared, shared.expand(3, 30, 4)), (each, each)):
        codec = HQMQ(radius_bits=5, outliers=None, codebook=book)
        expected, sure, _ = oracle(x, books, 5)
        np.testing.assert_allclose(in_chunks(codec.encode(x).decode())[sure], expected[sure], atol=1e-5)
    with pytest.raises(ValueError, match="for 3 heads was given to encode 2 heads"):
        HQMQ(outliers=None, codebook=each).encode(x[:, :2])


# Outliers


def med3(radii: np.ndarray, median: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Apply the paper's rule to (batch, heads, tokens, n) with a median per head; return (outliers, not near the limit)."""
    limit = 3 * median[:, :, None, None]
    return radii > limit, np.abs(radii / limit - 1) > 0.03


def test_med3x_keeps_chunks_beyond_three_medians_of_a_large_call() -> None:
    codec = HQMQ.paper("s48_r6_med3")
    x = with_outliers(2, 2, 40, 64)
    x[:, 1] *= 30  # each head has its own median
    p = codec.encode(x)
    radii = np.linalg.norm(in_chunks(x), axis=-1)
    wanted, sure = med3(radii, np.median(radii.reshape(2, 2, -1), axis=2))
    out = flags_of(p.tensors["flags"], 16)
    assert 0.005 < wanted.mean() < 0.05
    assert (out.numpy() == wanted)[sure].all()
    # The rest is quantised with the outliers' radius as the scale, as in the paper.
    expected, sure, _ = oracle(x, codec.secondaries(2, "value", 0), 6, out)
    got = in_chunks(p.decode())
    np.testing.assert_allclose(got[sure], expected[sure], rtol=2e-6, atol=1e-5 * float(x.abs().max()))
    assert np.array_equal(got[out.numpy()], in_chunks(x)[out.numpy()].astype(np.float16).astype(float))


def test_flags_for_more_chunks_than_there_are_are_refused() -> None:
    packed = HQMQ.paper("s24_r2_med3").encode(torch.randn(1, 2, 3, 36))
    tensors = {name: tensor.clone() for name, tensor in packed.tensors.items()}
    tensors["flags"][0, 1, 2, 1] |= 2  # the ninth chunk is the last
    with pytest.raises(ValueError, match=r"field 'flags' of .* is damaged: it has bits for more than 9 chunks"):
        Packed.from_parts(packed.metadata(), tensors)


def test_the_papers_median_is_of_one_sequence_and_one_call() -> None:
    codec = HQMQ.paper("s24_r4_med3")
    large = with_outliers(3, 2, 20, 32)
    large[1] *= 50
    whole = flags_of(codec.encode(large, "key", 4).tensors["flags"], 8)
    for row in range(3):
        assert torch.equal(flags_of(codec.encode(large[row : row + 1], "key", 4).tensors["flags"], 8), whole[row : row + 1])
    # An earlier call has no effect, even if this one has few tokens.
    codec.encode(0.001 * large, "key", 4)
    assert torch.equal(flags_of(codec.encode(large, "key", 4).tensors["flags"], 8), whole)
    one = HQMQ.paper("s24_r4_med3").encode(large[:, :, :1], "key", 4)
    assert torch.equal(codec.encode(large[:, :, :1], "key", 4).tensors["flags"], one.tensors["flags"])


def test_outliers_are_counted_in_the_bits() -> None:
    x = with_outliers(2, 2, 64, 128)
    p = HQMQ.paper("s96_r4_med3").encode(x)
    share = float(flags_of(p.tensors["flags"], 32).float().mean())
    assert share > 0.005
    assert p.bits_per_element == pytest.approx(4 + 16 / 128 + 1 / 4 + 16 * share)


def test_outliers_out_of_the_scale_leave_the_rest_its_precision() -> None:
    # In the paper's rule one giant chunk sets the scale and leaves the others few levels; Tessera's rule removes it first.
    x = gaussian(1, 2, 200, 64)
    x[..., 8:12] *= 60
    rest = [c for c in range(64) if not 8 <= c < 12]
    errors = [nmse(x[..., rest], codec.encode(x).decode()[..., rest]) for codec in (HQMQ.paper("s96_r4_med3"), HQMQ(96, 4))]
    assert errors[0] > 0.5
    assert errors[1] < 0.02


def test_our_rule_for_outliers_looks_at_one_vector_only() -> None:
    codec = HQMQ(96, 4, outliers=3.0)
    x = with_outliers(2, 2, 30, 64)
    x = x * torch.logspace(-2, 2, 30)[:, None]
    whole = codec.encode(x)
    radii = np.linalg.norm(in_chunks(x), axis=-1)
    limit = 3 * np.sort(radii, axis=-1)[..., 7:8]  # the lower of the two middle ones
    sure = np.abs(radii / limit - 1) > 1e-5
    flags = flags_of(whole.tensors["flags"], 16).numpy()
    assert flags.any(axis=(0, 2, 3)).all()
    assert (flags == (radii > limit))[sure].all()
    alone = torch.cat([codec.encode(x[:1, :, t : t + 1]).decode() for t in range(30)], 2)
    assert agreement(alone, whole.decode()[:1]) >= 0.998


# The authors' code


def test_the_authors_search_in_bfloat16_errs_more() -> None:
    x = gaussian(1, 4, 256, 128)
    for name, least, most in (("s96_r4", 1.02, 1.08), ("s192_r6", 1.06, 1.14)):
        ours, authors = (nmse(x, HQMQ.paper(n).encode(x).decode()) for n in (name, f"{name}_authors"))
        assert least < authors / ours < most


def test_the_authors_median_depends_on_the_call() -> None:
    x = (torch.randn(1, 2, 60, 16, 4) * torch.randn(1, 2, 60, 16, 1).exp()).flatten(-2)  # many chunks near the limit
    one = HQMQ.paper("s96_r4_med3_authors").encode(x)
    by_token = [HQMQ.paper("s96_r4_med3_authors").encode(x[:, :, t : t + 1]) for t in range(60)]
    flags = flags_of(one.tensors["flags"], 16)
    assert (flags != flags_of(torch.cat([p.tensors["flags"] for p in by_token], 2), 16)).any()
    # A second sequence, or padding, moves the median for the first.
    for other in (8 * x, torch.zeros_like(x)):
        both = HQMQ.paper("s96_r4_med3_authors").encode(torch.cat((x, other, other)))
        assert (flags_of(both.tensors["flags"], 16)[:1] != flags).any()


def test_variants_by_name() -> None:
    paper, authors = HQMQ.paper("s96_r4_med3"), HQMQ.paper("s96_r4_med3_authors")
    assert (paper.outlier_rule, paper.bf16_search, paper.outliers) == ("paper", False, 3.0)
    assert (authors.outlier_rule, authors.bf16_search, authors.outliers) == ("authors", True, 3.0)
    assert get("hqmq:s96_r4_authors") == HQMQ.paper("s96_r4_authors")
    for codec in (paper, authors):
        assert (codec.codebook, codec.radius, codec.rotate) == ("random", "uniform", False)
        assert get(codec.spec) == codec


# Names and bits


@pytest.mark.parametrize("radius_bits", [2, 3, 4, 6])
@pytest.mark.parametrize(("size", "direction_bits"), [(24, 10), (48, 11), (96, 12), (192, 13)])
def test_every_configuration_of_the_paper_has_its_bits(size: int, direction_bits: int, radius_bits: int) -> None:
    name = f"s{size}_r{radius_bits}"
    assert name in PAPER
    codec = HQMQ.paper(name)
    assert get(f"hqmq:{name}") == codec
    assert codec.spec == f"hqmq:{name}"
    assert (codec.secondary, codec.radius_bits, codec.outliers) == (size, radius_bits, None)
    assert direction_bits == math.ceil(math.log2(24 * size))
    for dim in (64, 128):
        p = codec.encode(gaussian(1, 2, 5, dim))
        # Whole bits per chunk and a half-precision scale per vector.
        assert p.bits_per_element == (direction_bits + radius_bits) / 4 + 16 / dim
        with_flags = HQMQ.paper(f"{name}_med3").encode(torch.ones(1, 2, 5, dim))
        assert with_flags.bits_per_element == (direction_bits + radius_bits) / 4 + 16 / dim + 1 / 4


def test_there_are_sixteen_configurations() -> None:
    assert len(set(PAPER)) == 16


def test_true_bits_that_the_tables_leave_out() -> None:
    x = gaussian(1, 1, 8, 128)
    for name, fractional, true in (("s24_r3", 3.04, 3.375), ("s96_r4", 3.79, 4.125), ("s192_r6", 4.54, 4.875)):
        codec = HQMQ.paper(name)
        assert (math.log2(24 * codec.secondary) + codec.radius_bits) / 4 == pytest.approx(fractional, abs=0.006)
        assert codec.encode(x).bits_per_element == true


@pytest.mark.parametrize(
    "codec",
    [
        HQMQ(96, 4, None),
        HQMQ(24, 6, 3.0, outlier_rule="paper"),
        HQMQ(170, 4, None, "optimised", "chi", rotate=True),
        HQMQ(21, 3, None, "optimised", "chi", rotate=True),
    ],
    ids=lambda c: c.spec,
)
def test_a_codec_that_has_a_name_goes_by_it(codec: HQMQ) -> None:
    assert codec.spec.startswith("hqmq:")
    x = gaussian(1, 2, 100)
    assert torch.equal(get(codec.spec).encode(x).decode(), codec.encode(x).decode())


def test_codecs_that_differ_are_not_equal() -> None:
    book = torch.nn.functional.normalize(torch.randn(24, 4), dim=-1)
    different = [
        HQMQ(),
        HQMQ(48),
        HQMQ(radius_bits=6),
        HQMQ(outliers=2.5),
        HQMQ(outliers=None),
        HQMQ(codebook="optimised"),
        HQMQ(radius="chi"),
        HQMQ(seed=1),
        HQMQ(outlier_rule="paper"),
        HQMQ(rotate=True),
        HQMQ(bf16_search=True),
        HQMQ(codebook=book),
        HQMQ(codebook=-book),
    ]
    assert len(set(different)) == len({codec.spec for codec in different}) == len(different)
    assert HQMQ(codebook=book.clone()) == HQMQ(codebook=book)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"secondary": 0}, "secondary must be 1 to 4096 quaternions, got 0"),
        ({"radius_bits": 0}, "radius_bits must be 1 to 8, got 0"),
        ({"outliers": -1.0}, "outliers must be a positive multiple of the median radius, or None, got -1"),
        ({"outliers": float("nan")}, "outliers must be .* got nan"),
        ({"codebook": "learned"}, "codebook must be 'random', 'optimised' or a tensor, got 'learned'"),
        ({"codebook": "optimised", "secondary": 97}, "no optimised codebook of 97 secondaries; there are 5, 10, 21"),
        ({"codebook": torch.ones(3, 3)}, r"a codebook must be floating point, \(S, 4\) or \(heads, S, 4\); got \(3, 3\)"),
        ({"codebook": torch.ones(3, 4)}, "a codebook must hold unit quaternions"),
        ({"radius": "log"}, "radius must be 'uniform' or 'chi', got 'log'"),
        ({"outlier_rule": "mean"}, "outlier_rule must be 'vector', 'paper' or 'authors', got 'mean'"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HQMQ(**arguments)  # type: ignore[arg-type]


# Codebooks


def test_random_codebooks_come_from_the_seed_alone() -> None:
    book = HQMQ.paper("s24_r3").secondaries(4, "key", 2)
    assert book.shape == (4, 24, 4)
    assert torch.equal(HQMQ(24, 6, seed=0).secondaries(4, "key", 2), book)
    # A head's codebook does not depend on the number of heads.
    assert torch.equal(HQMQ.paper("s24_r3").secondaries(2, "key", 2), book[:2])
    # Each layer, head, role and seed has its own codebook.
    books = [
        *book,
        *HQMQ.paper("s24_r3").secondaries(4, "key", 3),
        *HQMQ.paper("s24_r3").secondaries(4, "value", 2),
        *HQMQ.paper("s24_r3", seed=1).secondaries(4, "key", 2),
    ]
    for a, b in itertools.combinations(books, 2):
        assert not torch.isclose(a, b).all(-1).any()


def test_random_codebooks_are_those_that_files_were_written_with() -> None:
    first = HQMQ.paper("s24_r3").secondaries(1, "key", 0)[0, 0]
    torch.testing.assert_close(first, torch.tensor([0.1865169, -0.1959735, 0.9500471, 0.1556161]), atol=1e-6, rtol=0)


def test_random_codebooks_are_uniform_unit_quaternions() -> None:
    book = HQMQ(4096).secondaries(1, "value", 0)[0].double()
    assert torch.allclose(book.norm(dim=-1), torch.ones(4096, dtype=torch.float64), atol=1e-6)
    # Uniform directions in four dimensions have mean 0 and a quarter of the identity as second moment.
    assert book.mean(0).abs().max() < 5 * (1 / 4 / 4096) ** 0.5
    assert (book.T @ book / 4096 - torch.eye(4, dtype=torch.float64) / 4).abs().max() < 0.02


@pytest.mark.parametrize("size", DIRECTION_SIZES)
def test_optimised_secondaries_beat_random_ones(size: int) -> None:
    book = optimised_secondary(size)
    assert book.shape == (size, 4)
    assert torch.allclose(book.norm(dim=-1), torch.ones(size), atol=1e-6)
    units = torch.from_numpy(hurwitz_units())
    directions = torch.nn.functional.normalize(torch.randn(1500, 4, dtype=torch.float64), dim=-1)
    chords = []
    for secondary in (book, HQMQ(size).secondaries(1, "key", 0)[0]):
        words = torch.from_numpy(product(units.numpy()[:, None], secondary.double().numpy()[None]).reshape(-1, 4))
        chords.append(float((2 - 2 * (directions @ words.T).amax(1)).mean()))
    assert chords[0] < 0.85 * chords[1]


def test_five_optimised_secondaries_make_the_600_cell() -> None:
    words = product(hurwitz_units()[:, None], optimised_secondary(5).double().numpy()[None]).reshape(-1, 4)
    inner = words @ words.T
    np.fill_diagonal(inner, -1)
    # 120 vertices, each with twelve neighbours at 36 degrees.
    assert np.allclose(np.sort(inner, axis=1)[:, -12:], math.cos(math.pi / 5), atol=0.01)


@pytest.mark.parametrize("bits", [1, 3, 4, 6])
def test_chi_levels_are_the_means_of_their_cells(bits: int) -> None:
    levels = chi_levels(bits).double()
    assert levels.shape == (2**bits,)
    assert (levels.diff() > 0).all()
    radii = torch.randn(400_000, 4, dtype=torch.float64).norm(dim=-1)
    cell = torch.bucketize(radii, (levels[1:] + levels[:-1]) / 2)
    for code in range(2**bits):
        inside = radii[cell == code]
        if len(inside) > 100:
            assert inside.mean() == pytest.approx(float(levels[code]), abs=6 * float(inside.std()) / len(inside) ** 0.5)
