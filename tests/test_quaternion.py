"""The 24 units form the group that the codecs assume."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera import quaternion as Q

numbers = st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4)


def test_units_are_the_24_cell() -> None:
    u = Q.units()
    assert u.shape == (24, 4)
    assert torch.allclose(u.norm(dim=-1), torch.ones(24))
    assert len(torch.unique(u, dim=0)) == 24
    gram = u @ u.T
    gram.fill_diagonal_(0)
    assert gram.max() == 0.5  # sixty degrees apart


def test_unit_order_is_the_documented_one() -> None:
    u = Q.units()
    assert u[0].tolist() == [1, 0, 0, 0]
    assert u[3].tolist() == [0, -1, 0, 0]
    assert u[8].tolist() == [0.5] * 4
    assert u[8 + 0b0101].tolist() == [0.5, -0.5, 0.5, -0.5]


def test_products_of_units_are_units() -> None:
    u, table = Q.units(), Q.group_table()
    assert torch.equal(Q.hamilton(u[:, None], u[None]), u[table])
    for row in table:
        assert row.sort().values.tolist() == list(range(24))


def test_product_follows_hamiltons_rule() -> None:
    one, i, j, k = Q.units()[[0, 2, 4, 6]]
    assert torch.equal(Q.hamilton(i, j), k)
    assert torch.equal(Q.hamilton(j, i), -k)
    for q in (i, j, k):
        assert torch.equal(Q.hamilton(q, q), -one)


@given(numbers, numbers, numbers)
@settings(deadline=None)
def test_product_is_associative_and_multiplies_norms(a: list[float], b: list[float], c: list[float]) -> None:
    a, b, c = (torch.tensor(v, dtype=torch.float64) for v in (a, b, c))
    left, right = Q.hamilton(Q.hamilton(a, b), c), Q.hamilton(a, Q.hamilton(b, c))
    assert torch.allclose(left, right, atol=1e-6)
    assert torch.allclose(Q.hamilton(a, b).norm(), a.norm() * b.norm(), atol=1e-6)


def test_multiplying_by_a_unit_is_an_isometry() -> None:
    x = torch.randn(50, 4, dtype=torch.float64)
    u = Q.units(torch.float64)
    rotated = Q.hamilton(u[:, None], x[None])
    assert torch.allclose(rotated.norm(dim=-1), x.norm(dim=-1).expand(24, -1))
    assert torch.allclose(Q.hamilton(Q.conjugate(u)[:, None], rotated), x.expand(24, -1, -1))


@given(numbers)
@settings(deadline=None, max_examples=300)
def test_nearest_unit_is_exact(x: list[float]) -> None:
    v, u = torch.tensor(x), Q.units()
    products = u @ v
    # Equal to brute force up to ties, which float32 sums may resolve either way.
    assert products[Q.nearest_unit(v)] >= products.max() - 1e-5 * v.abs().sum() - 1e-30
    assert torch.isclose(Q.unit_projection(v), products.max(), rtol=1e-5, atol=1e-6)


def test_nearest_unit_of_zero_is_defined() -> None:
    assert Q.nearest_unit(torch.zeros(3, 4)).tolist() == [0, 0, 0]


def test_matrices_multiply_from_their_side() -> None:
    q, y = torch.randn(7, 4), torch.randn(7, 4)
    assert torch.allclose((Q.left_matrix(q) @ y[..., None])[..., 0], Q.hamilton(q, y), atol=1e-6)
    assert torch.allclose((Q.right_matrix(q) @ y[..., None])[..., 0], Q.hamilton(y, q), atol=1e-6)
