"""One call into C++ for all sources of a decoding step agrees with the definition."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations_with_replacement

import pytest
import torch
from kernel_inputs import NoKernel, make_pages, relative
from torch import Tensor

import tessera.kernels.cpu.sources as fused
from tessera import codecs
from tessera.codecs.channel_stats import KeyStats
from tessera.kernels import AttendParams, CompressedKV, cpu, dispatch
from tessera.kernels.source import Source

pytestmark = pytest.mark.skipif(cpu.MISSING is not None, reason=str(cpu.MISSING))


def exact(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    # At the front of a buffer, as in a tier.
    k, v = torch.randn(2, 2, 2, tokens + 9, 64).to(dtype)[..., :tokens, :].unbind(0)
    return k, v


def pages(spec: str) -> CompressedKV:
    return make_pages(codecs.get(spec), 2, 2, [128, 64], 64)


def weighed() -> CompressedKV:
    found = pages("hqmq:4")
    return CompressedKV(found.pages, stats=KeyStats(torch.randint(60, 90, (2, 2, 64), dtype=torch.uint8)))


KINDS: dict[str, Callable[[], Source]] = {
    "few": lambda: Source(exact(4)),
    "newest": lambda: Source(exact(130), 127),
    "window": lambda: Source(exact(300, torch.bfloat16), 299, 70),
    "hqmq": lambda: Source(pages("hqmq:4")),
    "paper": lambda: Source(pages("hqmq:s96_r4"), 190, 100),
    "weighed": lambda: Source(weighed()),
    "blocks": lambda: Source(pages("q4_0"), 190),
}
PACKED = ("hqmq", "paper", "weighed", "blocks")


def one_by_one(
    q: Tensor, given: list[Source], scale: float, softcap: float | None = None, backend: str = "reference"
) -> Tensor:
    parts = []
    for held, start, window in given:
        params = AttendParams(scale, None, softcap, start, window)
        packed = isinstance(held, CompressedKV)
        parts.append(dispatch.attend(q, held, params, backend) if packed else dispatch.attend_exact(q, *held, params, backend))
    return dispatch.merge(parts, backend)[0]


@pytest.mark.parametrize("level", cpu.levels())
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kinds", [pair for pair in combinations_with_replacement(KINDS, 2) if sum(kind in PACKED for kind in pair) < 2]
)
def test_two_sources_and_a_third(kinds: tuple[str, str], dtype: torch.dtype, softcap: float | None, level: str) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 6, 4, 64).to(dtype)
    given = [KINDS[kind]() for kind in ("few", *kinds)]
    got = fused.attend_sources(q, given, 0.1, softcap, level=level)
    assert got is not None
    assert got.dtype == torch.float32
    assert relative(got, one_by_one(q, given, 0.1, softcap)) < 1e-3
    assert relative(got, one_by_one(q, given, 0.1, softcap, f"cpu:{level}")) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_one_source(kind: str) -> None:
    torch.manual_seed(0)
    q, source = torch.randn(2, 4, 3, 64), KINDS[kind]()
    got = fused.attend_sources(q, [source], 0.1)
    assert got is not None
    assert relative(got, one_by_one(q, [source], 0.1)) < 1e-3


@pytest.mark.parametrize("level", cpu.levels())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [None, *PACKED])
@pytest.mark.parametrize("counts", [(4, 130), (1,), (70, 3)])
def test_the_newest_token_reads_all_that_is_in_the_buffers(
    counts: tuple[int, ...], kind: str | None, dtype: torch.dtype, level: str
) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 6, 1, 64).to(dtype)
    buffers = [(*torch.randn(2, 2, 2, tokens + 9, 64).to(dtype).unbind(0), tokens) for tokens in counts]
    packed = None if kind is None else KINDS[kind]().held
    assert packed is None or isinstance(packed, CompressedKV)
    got = dispatch.attend_newest(q, buffers, packed, 0.1, backend=f"cpu:{level}")
    assert got is not None
    assert got.dtype == torch.float32
    given = [Source((k[:, :, :tokens], v[:, :, :tokens])) for k, v, tokens in buffers]
    given += [] if packed is None else [Source(packed)]
    assert relative(got, one_by_one(q, given, 0.1)) < 1e-3
    assert relative(got, one_by_one(q, given, 0.1, None, f"cpu:{level}")) < 1e-6


def test_the_newest_token_is_left_where_one_call_cannot_do() -> None:
    q, (k, v) = torch.randn(2, 4, 1, 64), exact(9)
    assert dispatch.attend_newest(q, [(k, v, 9)], None, 0.1) is not None
    assert dispatch.attend_newest(q, [(k, v, 9)], None, 0.1, backend="reference") is None
    assert dispatch.attend_newest(q, [(k, v.bfloat16(), 9)], None, 0.1) is None
    assert dispatch.attend_newest(q, [(k.double(), v.double(), 9)], None, 0.1) is None
    assert dispatch.attend_newest(q, [(k.to("meta"), v.to("meta"), 9)], None, 0.1) is None
    assert dispatch.attend_newest(q, [(k, v, 9)], make_pages(NoKernel(), 2, 2, [64], 64), 0.1) is None
    assert dispatch.attend_newest(q.clone().requires_grad_(), [(k, v, 9)], None, 0.1) is None


def test_what_cannot_run_in_one_call_is_left() -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 4, 3, 64)
    wide = tuple(x.double() for x in exact(9))
    for given in (
        [Source(pages("hqmq:4")), Source(pages("hqmq:3"))],
        [Source(make_pages(NoKernel(), 2, 2, [64], 64)), Source(exact(9))],
        [Source((wide[0], wide[1]))],
        [Source(exact(9)), Source((exact(9)[0].to("meta"), exact(9)[1]))],
    ):
        assert dispatch.attend_sources(q, given, 0.1) is None
    assert dispatch.attend_sources(q, [Source(exact(9))], 0.1) is not None
    assert dispatch.attend_sources(q, [Source(exact(9))], 0.1, backend="reference") is None
    assert dispatch.attend_sources(q.requires_grad_(), [Source(exact(9))], 0.1) is None
