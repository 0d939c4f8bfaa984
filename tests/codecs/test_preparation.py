"""Preparation of vectors before coding: rotation, byte scales, centred and narrowed channels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.codecs import logscale, precondition
from tessera.codecs.rotation import rotation


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 12, 33, 64, 80, 96, 128, 256])
def test_rotation_is_orthonormal_for_any_head_dim(dim: int) -> None:
    r = rotation(dim).double()
    torch.testing.assert_close(r @ r.T, torch.eye(dim, dtype=torch.float64), atol=2e-6, rtol=0)
    assert torch.equal(rotation(dim), rotation(dim))
    if dim > 4:
        assert not torch.equal(rotation(dim), rotation(dim, seed=1))


def test_rotation_is_the_one_that_files_were_written_with() -> None:
    # The first row of a Hadamard matrix is all ones, so it shows the signs; they must not depend on the installation.
    signs = [1, 1, 1, -1, -1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1]
    assert (4 * rotation(16)[0]).tolist() == signs
    assert (3**0.5 * 2 * rotation(12)[0]).tolist() == pytest.approx(signs[:12])


@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128])
def test_rotation_spreads_every_coordinate(dim: int) -> None:
    # No coordinate may stay concentrated: at most the square root of 2 times an even spread, and for the
    # Hadamard sizes exactly even.
    most = rotation(dim).abs().max() * dim**0.5
    assert most <= 2**0.5 + 1e-5
    if dim & (dim - 1) == 0:
        assert most == pytest.approx(1)


@given(st.floats(2.0**-15.5, 2.0**15.5))
@settings(deadline=None, max_examples=200)
def test_a_scale_in_a_byte_is_the_nearest_eighth_of_an_octave(scale: float) -> None:
    code = logscale.to_byte(torch.tensor([scale], dtype=torch.float32))
    assert code.dtype == torch.uint8
    ratio = float(logscale.from_byte(code)) / scale
    assert 2 ** (-1 / 16) - 1e-5 <= ratio <= 2 ** (1 / 16) + 1e-5


def test_scales_saturate_and_zero_stays_zero() -> None:
    scale = torch.tensor([0.0, 1e-30, 1e-6, 1.0, 1e6, 1e30])
    assert logscale.to_byte(scale).tolist() == [0, 1, 1, 128, 255, 255]
    back = logscale.from_byte(logscale.to_byte(scale))
    assert back[[0, 3]].tolist() == [0, 1]
    assert torch.allclose(back[[1, 5]], torch.tensor([2.0 ** (-127 / 8), 2.0 ** (127 / 8)]))
    every = torch.arange(256).to(torch.uint8)
    assert torch.equal(logscale.to_byte(logscale.from_byte(every)), every)


@given(st.integers(0, 10**6), st.integers(1, 200))
@settings(deadline=None, max_examples=40)
def test_preconditioning_is_undone(seed: int, tokens: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(2, 2, tokens, 12) * torch.logspace(-3, 3, 12) + 10 * torch.randn(12)
    words = precondition.fit(x, 64)
    index = torch.arange(tokens) // 64
    assert words.shape == (2, 2, -(-tokens // 64), 12)
    assert words.dtype == torch.int16
    back = precondition.invert(precondition.apply(x, words, index), words, index)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-4)


def test_each_group_is_centred_by_its_own_mean() -> None:
    x = torch.randn(1, 2, 150, 16) + 100 * torch.randn(1, 2, 1, 16)
    x[:, :, 64:128] -= 300
    y = precondition.apply(x, precondition.fit(x, 64), torch.arange(150) // 64)
    for group in (slice(0, 64), slice(64, 128), slice(128, 150)):
        # The stored mean has seven bits of mantissa, so its relative error is at most 1/128.
        assert (y[:, :, group].mean(2).abs() <= x[:, :, group].mean(2).abs() / 128 + 1e-4).all()


def test_the_filling_of_an_incomplete_group_does_not_count() -> None:
    x = torch.randn(1, 1, 70, 8)
    x[:, :, 69] = 500  # the token that pads an incomplete group
    mean, _ = precondition.unpack(precondition.fit(x, 64))
    assert torch.allclose(mean[0, 0, 1], x[0, 0, 64:].mean(0), rtol=0.01)


def test_channels_much_wider_than_the_median_are_narrowed() -> None:
    width = torch.ones(32)
    width[3], width[7], width[20], width[21] = 100.0, 3.0, 1e4, 1e9
    x = torch.randn(1, 1, 640, 32) * width
    words = precondition.fit(x, 64)
    _, factor = precondition.unpack(words)
    assert (factor[..., [c for c in range(32) if c not in (3, 20, 21)]] == 1).all()
    y = precondition.apply(x, words, torch.arange(640) // 64)
    for channel in (3, 20):
        assert 0.7 < y[..., channel].std() < 2.5
    assert (factor[..., 21] == 2**15).all()  # the maximum of four bits


def test_constant_channels_have_no_width() -> None:
    x = torch.zeros(1, 1, 64, 16)
    x[..., 2] = 5000.0
    words = precondition.fit(x, 64)
    _, factor = precondition.unpack(words)
    assert (factor == 1).all()
    assert precondition.apply(x, words, torch.zeros(64, dtype=torch.long)).abs().max() <= 5000 / 128


@given(st.floats(-65504, 65504, width=16), st.integers(0, 15))
@settings(deadline=None, max_examples=300)
def test_a_word_holds_a_mean_and_an_exponent(mean: float, exponent: int) -> None:
    word = precondition._word(torch.tensor([mean], dtype=torch.float32), torch.tensor([float(exponent)]))
    back, factor = precondition.unpack(word)
    assert factor.item() == 2.0**exponent
    assert abs(back.item() - mean) <= max(abs(mean) / 64, 2.0**-20)
    assert abs(back.item()) <= 65504
