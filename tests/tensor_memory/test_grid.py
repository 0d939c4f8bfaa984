"""Positions, weights and reads on the grid."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from tessera.tensor_memory.coordinates import centres, gaussian, nearest, positions, sample

GRIDS = [(5,), (1,), (4, 3), (2, 5, 3), (4, 1, 6)]


def volume(factors: tuple[Tensor, ...]) -> Tensor:
    letters = "abc"[: len(factors)]
    return torch.einsum(",".join(f"...{x}" for x in letters) + "->..." + letters, *factors)


def cells(grid: tuple[int, ...]) -> Tensor:
    """Return the centres of all cells, (*grid, n), x first."""
    return torch.stack(torch.meshgrid(*(centres(size) for size in grid), indexing="ij")[::-1], dim=-1)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_read_is_the_sum_of_the_corners_by_their_nearness(grid: tuple[int, ...]) -> None:
    h, at = torch.randn(2, 3, *grid), torch.rand(2, 7, len(grid)) * 2.6 - 1.3  # some outside of the border
    wanted = torch.zeros(2, 7, 3)
    for b, r in itertools.product(range(2), range(7)):
        where = positions(at, grid)[b, r]
        for cell in itertools.product(*map(range, grid)):
            weight = (1 - (where - torch.tensor(cell)).abs()).clamp(min=0).prod()
            wanted[b, r] += weight * h[(b, slice(None), *cell)]
    torch.testing.assert_close(sample(h, at), wanted)


def test_a_read_is_what_grid_sample_reads() -> None:
    h, at = torch.randn(2, 3, 4, 5, 6), torch.rand(2, 7, 3) * 2.6 - 1.3
    wanted = grid_sample(h, at[:, :, None, None], padding_mode="border", align_corners=True)[..., 0, 0].transpose(1, 2)
    torch.testing.assert_close(sample(h, at), wanted)
    flat, on = h[:, :, 0], at[..., :2]
    wanted = grid_sample(flat, on[:, :, None], padding_mode="border", align_corners=True)[..., 0].transpose(1, 2)
    torch.testing.assert_close(sample(flat, on), wanted)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_cell_is_read_at_its_centre(grid: tuple[int, ...]) -> None:
    h = torch.randn(1, 2, *grid)
    at = cells(grid).view(1, -1, len(grid))
    torch.testing.assert_close(sample(h, at), h.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("grid", GRIDS)
def test_the_weights_of_a_write_are_a_gaussian_of_the_distance(grid: tuple[int, ...]) -> None:
    at, sigma = torch.rand(2, 3, len(grid)) * 2 - 1, torch.rand(2, 3) + 0.1
    distance = (cells(grid) - at.view(2, 3, *[1] * len(grid), len(grid))).square().sum(-1)
    wanted = torch.exp(-distance / (2 * sigma.view(2, 3, *[1] * len(grid)).square() + 1e-6))
    torch.testing.assert_close(volume(gaussian(at, sigma, grid)), wanted)


def test_a_local_write_is_zero_away_from_its_place_and_close_to_the_gaussian_about_it() -> None:
    grid, at, sigma = (9, 9), torch.tensor([0.25, -0.5]), torch.tensor(0.25)
    local, whole = volume(gaussian(at, sigma, grid, local=True)), volume(gaussian(at, sigma, grid))
    far = ((cells(grid) - at).abs() > 3.1 * sigma).any(-1)
    assert far.any()
    assert (local[far] == 0).all()
    assert (whole[far] > 0).all()
    assert (local - whole).abs().max() < 0.03
    # The first coordinate, x, is along the last axis, the width; y is along the height.
    assert local.argmax().item() == 2 * 9 + 5


@pytest.mark.parametrize("grid", GRIDS)
def test_the_nearest_cell_is_the_one_whose_centre_is_nearest(grid: tuple[int, ...]) -> None:
    at = torch.rand(20, len(grid)) * 2 - 1
    weights = volume(nearest(at, grid)).flatten(1)
    assert (weights.sum(1) == 1).all()
    distance = (cells(grid).view(1, -1, len(grid)) - at[:, None]).square().sum(-1)
    torch.testing.assert_close(distance.gather(1, weights.argmax(1, keepdim=True))[:, 0], distance.min(1).values)
