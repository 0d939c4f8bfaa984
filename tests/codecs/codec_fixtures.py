"""The codecs under test, and functions that make inputs and measure results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from allpairspy import AllPairs
from torch import Tensor

import codec_error  # of benchmarks/
from tessera import codecs
from tessera.codecs import Role

ROLES: tuple[Role, ...] = ("key", "value")

#: Every registered codec by its examples, and settings that use other code paths. Of ``hqmq:b`` those above
#: 4 bits are left out where the size does not matter, since indexing their codebooks takes seconds.
SPECS = (
    *(spec for spec in codecs.examples() if spec != "hqmq:5" and type(codecs.get(spec)).__module__.startswith("tessera.")),
    "hqmq:2",
    "hqmq:2.5",
    "hqmq:4_norot",
    "hqmq:3_nocentre",
    "hqmq:o21_r3",
    "hqmq:s24_r3",
    "hqmq:s24_r2_med3_authors",
    "q8_0:norot",
    "int:3",
    "int:8",
    "kivi:2",
    "kivi:3",
    "scalar:3",
)

#: Codecs in which a token's result depends only on its group. The others find outliers by a median over the call.
BY_TOKEN = tuple(spec for spec in SPECS if "_med3" not in spec)
#: Codecs in which a result does not depend on other rows.
BY_ROW = tuple(spec for spec in SPECS if "_med3_authors" not in spec)


def pairwise(**axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize a test so that every two values of two axes meet in a case, instead of all combinations of all axes."""
    return pytest.mark.parametrize(tuple(axes), [tuple(row) for row in AllPairs(list(axes.values()))])


class Laws:
    """Cases for several tests that hold for all codecs, such that every two of a test, a codec and a role meet in one.

    A test meets every codec and both roles, and a codec both roles in some test, in half of the cases that all combinations
    would be. Use it as a decorator: ``@LAWS`` takes the test's own name, which must be among `names`.
    """

    def __init__(self, names: Sequence[str], specs: Sequence[str] = SPECS) -> None:
        self.rows = [tuple(row) for row in AllPairs([list(names), list(specs), list(ROLES)])]
        self.names = set(names)

    def __call__(self, test: Any) -> Any:
        if test.__name__ not in self.names:
            raise ValueError(f"{test.__name__} is not among the laws")
        rows = [(spec, role) for name, spec, role in self.rows if name == test.__name__]
        return pytest.mark.parametrize(("spec", "role"), rows)(test)


def nmse(x: Tensor, approximation: Tensor) -> float:
    """Return the squared error divided by the sum of squares."""
    return float((x.float() - approximation.float()).square().sum() / x.float().square().sum())


def gaussian(batch: int = 2, heads: int = 2, tokens: int = 70, dim: int = 32) -> Tensor:
    """Draw independent normal numbers."""
    return torch.randn(batch, heads, tokens, dim)


def giant_keys() -> tuple[Tensor, Tensor]:
    """Return the benchmark's keys with giant channels, and for each channel whether it is ordinary."""
    dim = 64
    ordinary = torch.ones(dim, dtype=torch.bool)
    for channels in codec_error.giant_channels(dim):
        ordinary[channels] = False
    return codec_error.giant_keys(256, dim, torch.default_generator), ordinary


def agreement(a: Tensor, b: Tensor) -> float:
    """Return the share of elements that are equal within float32 rounding.

    Sums in another order may resolve a tie between two codewords differently, so a few elements may differ by more.
    """
    size = torch.maximum(a.float().abs(), b.float().abs())
    # A rotation spreads the rounding error of a vector's largest number over all its numbers.
    unit = 1e-5 * size.amax(-1, keepdim=True)
    return float(((a.float() - b.float()).abs() <= unit).float().mean()) if a.numel() else 1.0
