"""The C++ search at each instruction set agrees with the distances to all codewords in double precision."""

from itertools import permutations

import pytest
import torch
from torch import Tensor

from tessera.codecs.codebooks import JOINT_BITS, joint
from tessera.codecs.hqmq_joint import words_of
from tessera.kernels import cpu, dispatch
from tessera.quaternion import hamilton, units

pytestmark = pytest.mark.skipif(cpu.MISSING is not None, reason=str(cpu.MISSING))

#: Tolerance of distances that count as equal: the rounding of float32 for the lengths of codewords.
TIE = 2e-6


@pytest.fixture(params=cpu.levels())
def level(request: pytest.FixtureRequest) -> str:
    return request.param


def distances(x: Tensor, bits: int) -> Tensor:
    """Return the distances of chunks (n, 4) to the nearest codeword, in float64."""
    book = words_of(bits)
    # In blocks of rows, so that the differences stay in the processor's cache.
    words = (book.products.double() * book.step).T.contiguous()
    return torch.stack([sum((w - c).square() for w, c in zip(words, p, strict=True)).amin().sqrt() for p in x.double()])


def check(x: Tensor, bits: int, level: str) -> None:
    """Check that no codeword is nearer to a chunk than the one found."""
    book = joint(bits)
    found = dispatch.nearest(x, words_of(bits), backend=f"cpu:{level}").long()
    far = (x.double() - book.codewords[found].double() * book.step).norm(dim=-1)
    excess = far - distances(x, bits)
    assert excess.max() <= TIE, f"{x[excess.argmax()].tolist()} gets code {found[excess.argmax()]}, {excess.max():.2e} too far"


def count(bits: int, few: int) -> int:
    """Return the number of chunks, fewer for large codebooks, because of the brute-force comparison."""
    return max(40, min(few, (1 << 25) >> bits))


@pytest.mark.parametrize("bits", JOINT_BITS)
def test_gaussian_chunks_of_every_size_get_the_nearest_codeword(level: str, bits: int) -> None:
    n = count(bits, 3000)
    x = torch.randn(n, 4)
    x[: n // 4] *= torch.logspace(-6, 4, n // 4)[:, None]
    check(x, bits, level)


@pytest.mark.parametrize("bits", JOINT_BITS)
def test_codewords_get_their_own_codes(level: str, bits: int) -> None:
    book = joint(bits)
    code = torch.randint(len(book.codewords), (5000,))
    words = book.codewords.float() * book.step
    found = dispatch.nearest(words[code], words_of(bits), backend=f"cpu:{level}").long()
    assert torch.equal(book.codewords[found], book.codewords[code])


def hard_chunks(bits: int) -> dict[str, Tensor]:
    """Return difficult chunks, by the kind of difficulty."""
    book = words_of(bits)
    step, words = book.step, book.products.float() * book.step
    n = count(bits, 400)
    base = torch.randn(n, 4)
    # On planes where the reduction to the region is not unique: components that are equal, zero, or the sum of others.
    planes = base.clone()
    planes[::4, 1] = planes[::4, 0]
    planes[1::4, 2] = -planes[1::4, 3]
    planes[2::4, 0] = planes[2::4, 1:].abs().sum(-1)
    planes[3::4, 1:3] = 0
    pairs = words[torch.randint(len(words), (n,))]
    # Between two neighbouring codewords: one, and the one found a little away from it.
    beside = words_of(bits).products.float() * step
    other = torch.stack(
        [beside[(beside - (p + 0.7 * d)).square().sum(-1).argmin()] for p, d in zip(pairs, torch.randn(n, 4), strict=True)]
    )
    border = (base / (2 * step)).round() * 2 * step
    return {
        "planes": planes,
        "rotated planes": hamilton(units()[torch.randint(24, (n,))], planes),
        "middles": (pairs + other) / 2,
        "borders of cells": border,
        "a hair beside borders": border * (1 + 2**-23),
        "equal components": torch.tensor(
            [p for v in ((1, 1, 1, 1), (1, 1, 0, 0), (1, 0, 0, 0), (2, 1, 1, 0)) for p in set(permutations(v))]
        ).float(),
        "zeros": torch.tensor([[0.0, 0, 0, 0], [-0.0, 0, -0.0, 0], [0, 0, 1e-45, 0], [-1e-40, 1e-41, 0, 3e-39]]),
        "far": base[:40] * torch.tensor([3.0, 10, 1e3, 1e5]).repeat(10)[:, None],
        "edge of the codebook": torch.nn.functional.normalize(base, dim=-1)
        * words.norm(dim=-1).max()
        * torch.linspace(0.9, 1.5, n)[:, None],
        "near the origin": base * torch.linspace(0, 0.2, n)[:, None],
    }


@pytest.mark.parametrize("bits", [10, 12, 14, 16, 18])
def test_hard_chunks_get_the_nearest_codeword(level: str, bits: int) -> None:
    for name, x in hard_chunks(bits).items():
        try:
            check(x, bits, level)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_huge_chunks_get_codewords_in_their_direction(level: str, bits: int) -> None:
    book = joint(bits)
    x = torch.randn(200, 4) * torch.logspace(6, 34, 200)[:, None]
    words = book.codewords.double() * book.step
    code = dispatch.nearest(x, words_of(bits), backend=f"cpu:{level}").long()
    direction = torch.nn.functional.normalize(x.double(), dim=-1)
    reached, most = (direction * words[code]).sum(-1), (direction @ words.T).amax(-1)
    assert (most - reached).max() < 1e-5


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_numbers_that_are_not_finite_get_some_code(level: str, bits: int) -> None:
    x = torch.randn(64, 4)
    x[::3, 1], x[1::3, 0], x[2::3, 3] = torch.nan, torch.inf, -torch.inf
    code = dispatch.nearest(x, words_of(bits), backend=f"cpu:{level}")
    assert ((code >= 0) & (code < len(joint(bits).codewords))).all()


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("n", [0, 1, 3, 17, 63, 64, 65, 1025])
def test_a_chunk_gets_the_same_code_wherever_it_stands(level: str, bits: int, n: int) -> None:
    x = torch.randn(n, 4) * 2
    together = dispatch.nearest(x, words_of(bits), backend=f"cpu:{level}")
    assert together.shape == (n,)
    order = torch.randperm(n)
    assert torch.equal(dispatch.nearest(x[order], words_of(bits), backend=f"cpu:{level}"), together[order])


@pytest.mark.parametrize("bits", [8, 12, 14, 16])
def test_codes_are_those_of_the_reference(level: str, bits: int) -> None:
    x = torch.randn(20_000, 4)
    got = dispatch.nearest(x, words_of(bits), backend=f"cpu:{level}")
    # Two codewords may be equally near within rounding.
    assert (got != dispatch.nearest(x, words_of(bits), backend="reference")).float().mean() < 1e-3
