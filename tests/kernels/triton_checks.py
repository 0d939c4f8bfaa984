"""Devices and tolerances of the Triton tests, which run on a GPU if there is one, otherwise interpreted."""

from __future__ import annotations

from typing import Any

import torch
from kernel_inputs import make_pages, relative

from tessera.kernels import AttendParams, CompressedKV, reference, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Queries and weights are in half precision, and the keys' constant channel makes some scores large: 3e-4 is usual, but one
#: draw in hundreds has 2e-3.
HALF = 5e-3


def moved(pages: CompressedKV) -> CompressedKV:
    return CompressedKV([(keys.to(DEVICE), values.to(DEVICE)) for keys, values in pages.pages])


def check(codec: Any, shape: tuple[int, int, int, int], sizes: list[int], dim: int, **rule: Any) -> None:
    batch, heads, kv_heads, queries = shape
    pages = make_pages(codec, batch, kv_heads, sizes, dim)
    q = torch.randn(batch, heads, queries, dim)
    how = {name: rule.pop(name) for name in ("splits", "lookup") if name in rule}
    on_device = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in rule.items()}
    out, lse = triton.attend(q.to(DEVICE), moved(pages), AttendParams(dim**-0.5, **on_device), **how)
    wanted, wanted_lse = reference.attend(q, pages, AttendParams(dim**-0.5, **rule))
    assert relative(out.cpu(), wanted) < HALF
    assert torch.equal(lse.cpu() == -torch.inf, wanted_lse == -torch.inf)
    seen = wanted_lse > -torch.inf
    assert torch.allclose(lse.cpu()[seen], wanted_lse[seen], atol=2e-2, rtol=1e-3)
