"""Infini-attention agrees with an explicit loop of its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import elu

from tessera.tensor_cache.infini import Infini


def inputs(tokens: int) -> list[Tensor]:
    return [torch.randn(2, heads, tokens, 8) for heads in (4, 2, 2, 4, 2)]


def written_out(infini: Infini, q: Tensor, k: Tensor, v: Tensor, plain_q: Tensor, plain_k: Tensor) -> Tensor:
    """Compute Infini-attention one token at a time, in double precision."""
    q, k, v, plain_q, plain_k = (x.double() for x in (q, k, v, plain_q, plain_k))
    batch, heads, tokens, dim = q.shape
    out = torch.zeros_like(q)
    mix = torch.sigmoid(infini.mix_logit.double())
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // k.shape[1])
            m, z = torch.zeros(dim, dim).double(), torch.zeros(dim).double()
            for t in range(tokens):
                first = t // infini.segment * infini.segment
                if t == first and t:
                    keys = elu(plain_k[b, g, first - infini.segment : first]) + 1
                    values = v[b, g, first - infini.segment : first]
                    known = keys @ m / (keys @ z)[:, None] if z.any() else 0
                    m, z = m + keys.T @ (values - known), z + keys.sum(0)
                weights = (k[b, g, first : t + 1] @ q[b, h, t] / dim**0.5).softmax(0)
                local = weights @ v[b, g, first : t + 1]
                asked = elu(plain_q[b, h, t]) + 1
                read = asked @ m / (asked @ z) if z.any() else torch.zeros(dim).double()
                out[b, h, t] = mix[h] * read + (1 - mix[h]) * local
    return out.float()


@pytest.mark.parametrize(("segment", "tokens"), [(5, 23), (8, 16), (30, 11), (1, 4)])
def test_it_is_what_it_says(segment: int, tokens: int) -> None:
    infini = Infini(segment, 4)
    with torch.no_grad():
        infini.mix_logit.normal_()
    x = inputs(tokens)
    torch.testing.assert_close(infini(*x)[0], written_out(infini, *x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cuts", [(0, 23), (1, 22), (5, 5, 13), (7, 9, 7)])
def test_a_stream_may_be_cut_anywhere(cuts: tuple[int, ...]) -> None:
    infini = Infini(5, 4)
    x = inputs(23)
    whole, end = infini(*x)
    state, parts = None, []
    for piece in zip(*(t.split(cuts, 2) for t in x), strict=True):
        part, state = infini(*piece, state=state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.m, end.m, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.k, end.k)


def test_no_segment_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        Infini(0, 4)
