"""The indexed search agrees with brute force over all codewords."""

import pytest
import torch

from tessera.codecs.codebooks import JOINT_BITS, joint
from tessera.kernels.nearest import CellIndex, brute_force, build_index, canonical_rotation, nearest
from tessera.quaternion import conjugate, hamilton, units


@pytest.fixture(scope="module", params=[b for b in JOINT_BITS if b <= 16])
def index(request: pytest.FixtureRequest) -> CellIndex:
    book = joint(request.param)
    return build_index(book.products.float() * book.step, book.conjugations)


def samples(count: int) -> torch.Tensor:
    """Draw chunks of every size: Gaussian, tiny, huge, with zeros, and on boundaries where units tie."""
    x = torch.randn(count, 4)
    x[: count // 10] *= torch.logspace(-6, 3, count // 10)[:, None]
    x[count // 10 : count // 5, 1:3] = 0
    x[count // 5 : count // 4] = x[count // 5 : count // 4].sign() * 0.7
    return x


def test_search_finds_the_nearest_codeword(index: CellIndex) -> None:
    x = samples(4000)
    found = (x - index.words[nearest(x, index)]).norm(dim=-1)
    best = (x - index.words[brute_force(x, index.words)]).norm(dim=-1)
    assert (found - best).max() < 1e-5 * (1 + x.norm(dim=-1)).max()
    near = x.norm(dim=-1) < 4
    assert (found - best)[near].max() < 1e-5


def test_search_compares_few_codewords(index: CellIndex) -> None:
    x = torch.randn(2000, 4)
    length = x.norm(dim=-1)
    x = x[(length > 0.3) & (length < index.radius)]  # chunks outside of the lists, and near the origin, are searched in full
    assert index.candidates.shape[1] <= 32 < len(index.words) / 2
    # The lists are used: otherwise every chunk would fall back to the full search, which raises here.
    blind = CellIndex(**{**vars(index), "words": torch.full((1, 4), torch.nan)})
    assert torch.equal(nearest(x, blind), nearest(x, index))


def test_search_of_nothing_and_of_zero(index: CellIndex) -> None:
    assert nearest(torch.zeros(0, 4), index).shape == (0,)
    code = nearest(torch.zeros(1, 4), index)
    assert torch.isclose(index.words[code].norm(), index.words.norm(dim=-1).min())


@pytest.mark.slow
@pytest.mark.parametrize("bits", [18, 20])
def test_search_finds_the_nearest_codeword_of_large_codebooks(bits: int) -> None:
    book = joint(bits)
    index = build_index(book.products.float() * book.step, book.conjugations)
    x = samples(1000)
    found = (x - index.words[nearest(x, index)]).norm(dim=-1)
    best = (x - index.words[brute_force(x, index.words)]).norm(dim=-1)
    assert (found - best)[x.norm(dim=-1) < 4].max() < 1e-5


def test_canonical_rotation_is_a_rotation_into_the_region() -> None:
    v = torch.randn(500, 3)
    rotated, code = canonical_rotation(v)
    assert torch.allclose(rotated.norm(dim=-1), v.norm(dim=-1))
    assert (rotated[:, 0] >= rotated[:, 1]).all()
    assert (rotated[:, 1] >= 0).all()
    assert (rotated[:, 0] >= rotated[:, 2].abs()).all()
    assert set(code.tolist()) == set(range(12))


@pytest.mark.parametrize("bits", JOINT_BITS)
def test_codebooks_are_integers_closed_under_the_units(bits: int) -> None:
    book = joint(bits)
    assert (book.base.int().sum(-1) % 2 == 0).all()
    words = {tuple(row) for row in book.codewords.tolist()}
    assert len(words) <= len(book.codewords) <= 2**bits
    sample = book.codewords[torch.randperm(len(book.codewords))[:40]].float()
    for u in units():
        assert all(tuple(row) in words for row in hamilton(u, sample).int().tolist())
        if book.conjugations:
            rotated = hamilton(hamilton(u, sample), conjugate(u))
            assert all(tuple(row) in words for row in rotated.int().tolist())
    if bits <= 16:
        assert book.codewords.abs().max() <= 127


@pytest.mark.parametrize("bits", JOINT_BITS)
def test_codes_number_the_same_codewords_as_products(bits: int) -> None:
    book = joint(bits)
    assert torch.equal(book.codewords[book.codes], book.products)
    assert torch.equal(book.codes.sort().values, torch.arange(len(book.products)))
    # Fields of a code: the representative, and the permutation.
    permutation, sign = book.signed_permutations
    code = torch.randint(len(book.codewords), (50,))
    representative, number = code // len(sign), code % len(sign)
    moved = book.representatives[representative].gather(1, permutation[number]) * sign[number]
    assert torch.equal(moved.to(torch.int16), book.codewords[code])
