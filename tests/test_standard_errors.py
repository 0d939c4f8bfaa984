"""Standard errors of means account for correlation between neighbouring tokens."""

from __future__ import annotations

import math

import pytest
import torch

from tessera.evaluation.standard_errors import standard_error


def spread_of_means(values: torch.Tensor) -> float:
    """Return the standard deviation of the mean over texts. values: (texts, windows, tokens)."""
    return float(values.mean((1, 2)).std())


@pytest.mark.parametrize("alike", [1, 8, 16])
def test_an_error_is_how_far_means_of_other_texts_lie_apart(alike: int) -> None:
    texts = torch.randn(400, 4, 512 // alike).repeat_interleave(alike, dim=2)
    found = torch.tensor([standard_error(text) for text in texts]).mean()
    assert float(found) == pytest.approx(spread_of_means(texts), rel=0.15)
    naive = float(texts.std((1, 2)).mean()) / math.sqrt(4 * 512)
    assert naive == pytest.approx(spread_of_means(texts) / math.sqrt(alike), rel=0.15)


def test_no_block_spans_two_windows() -> None:
    a, b = torch.randn(1, 100), torch.randn(1, 100)
    assert standard_error(torch.cat((a, b))) == pytest.approx(standard_error(torch.cat((b, a))))
    assert standard_error(torch.cat((a, b), dim=1)) != pytest.approx(standard_error(torch.cat((b, a), dim=1)))


def test_what_varies_not_has_no_error() -> None:
    assert standard_error(torch.full((2, 100), 3.0)) == 0.0
    assert standard_error(torch.ones(1, 1)) == 0.0
    assert standard_error(torch.tensor([[1.0, 2.0]])) == pytest.approx(0.5)
