"""For attention by block table, the definition agrees with a loop over tokens, and the kernels with both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kernel_inputs import NoKernel
from torch import Tensor

from tessera import codecs
from tessera.codecs.channel_stats import KeyStats
from tessera.codecs.pages import block_layout, write
from tessera.kernels import cpu, dispatch, paged, triton
from tessera.kernels.paged import GROUP, BlockLayout, PagedCall, Step

#: Every backend available here; with three limbs the AVX-512 kernel is as exact as float32 sums.
LEVELS = ("reference", *(f"cpu:{level}" for level in cpu.levels()))


@dataclass
class Engine:
    """A model of an engine: a pool, tables with blocks in any order, and requests that are processed in steps.

    Attributes:
        q, k, v: those of each request, (tokens, heads, head_dim).
    """

    layout: BlockLayout
    codec: codecs.Codec
    pool: Tensor
    ring: Tensor
    table: Tensor
    rings: Tensor
    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]

    @staticmethod
    def make(
        lengths: list[int],
        *,
        heads: int = 6,
        kv_heads: int = 2,
        dim: int = 64,
        dtype: torch.dtype = torch.float32,
        spec: str = "hqmq:4",
        sink: int = 4,
        pages: int = 2,
        ring: int = GROUP,
        stats: bool = False,
    ) -> Engine:
        codec = codecs.get(spec)
        layout = block_layout(
            codec, dim, dtype, pages=pages, sink=sink, heads=kv_heads, stats=_stats(kv_heads, dim) if stats else None
        )
        needed = [-(-n // layout.tokens) for n in lengths]
        blocks = sum(needed) + 3
        order = torch.randperm(blocks)
        table = torch.full((len(lengths), max(needed)), blocks - 1, dtype=torch.int32)
        for r, n in enumerate(needed):
            table[r, :n] = order[sum(needed[:r]) : sum(needed[:r]) + n]
        # An engine's memory has arbitrary contents.
        pool = torch.randint(0, 256, (blocks, kv_heads, layout.nbytes), dtype=torch.uint8)
        rings = torch.randint(0, 256, (len(lengths) + 2, kv_heads, ring, layout.ring_bytes), dtype=torch.uint8)
        draw = [[torch.randn(n, h, dim) for n in lengths] for h in (heads, kv_heads, kv_heads)]
        for k in draw[1]:
            k[..., 3] += 20
            k[:2] *= 3  # the first keys differ from the others
        q, k, v = ([x.to(dtype) for x in xs] for xs in draw)
        ring_table = torch.randperm(len(lengths) + 2)[: len(lengths), None].int()
        return Engine(layout, codec, pool, rings, table, ring_table, q, k, v)

    def step(self, spans: list[tuple[int, int]], backend: str, **rules: Any) -> list[Tensor]:
        """Run a step with tokens [a, b) of each request and return the results. rules: window, softcap and drains."""
        counts = torch.tensor([b - a for a, b in spans])
        first = torch.cat((torch.zeros(1, dtype=torch.long), counts.cumsum(0))).int()
        step = Step(first, torch.tensor([b for _, b in spans]).int(), self.table, self.rings, {})
        q, k, v = (torch.cat([x[r][a:b] for r, (a, b) in enumerate(spans)]) for x in (self.q, self.k, self.v))
        groups = step.whole_groups()
        if groups.shape[1]:
            keys, values = dispatch.collect(k, v, self.pool, self.ring, self.layout, step, backend=backend)
            request, group = groups.long()
            block = self.table[request, group // self.layout.pages].long()
            write(self.codec, self.layout, self.pool, block, group % self.layout.pages, keys, values, group == 0)
        out = torch.empty_like(q)
        call = PagedCall(q, k, v, self.pool, self.ring, self.layout, step, self.layout.head_dim**-0.5, **rules)
        dispatch.attend_paged(call, out=out, backend=backend)
        return list(out.split(counts.tolist()))

    def serve(self, sizes: list[int], backend: str, **rules: Any) -> list[Tensor]:
        """Run all tokens, request r in steps of sizes[r]; finished requests have no tokens in a step."""
        done = [0] * len(self.q)
        found: list[list[Tensor]] = [[] for _ in self.q]
        while any(n < len(q) for n, q in zip(done, self.q, strict=True)):
            spans = [(n, min(len(q), n + size)) for n, q, size in zip(done, self.q, sizes, strict=True)]
            for r, part in enumerate(self.step(spans, backend, **rules)):
                found[r].append(part)
            done = [b for _, b in spans]
        return [torch.cat(parts) for parts in found]


def plain(
    engine: Engine, r: int, window: int | None = None, softcap: float | None = None, drains: Tensor | None = None
) -> Tensor:
    """Compute a request's expected results by a loop over tokens, without tables, groups of queries or kernels."""
    layout, codec = engine.layout, engine.codec
    q, k, v = (x[r].float() for x in (engine.q, engine.k, engine.v))
    shared = q.shape[1] // k.shape[1]
    coded_k, coded_v = k.clone(), v.clone()
    for a in range(0, len(k) // GROUP * GROUP, GROUP):
        for source, coded, role in ((k, coded_k, "key"), (v, coded_v, "value")):
            group = source[a : a + GROUP].clone()
            exact = layout.sink if a == 0 else 0
            group[:exact] = group[exact:].mean(0)
            rows, weights = group.transpose(0, 1)[None], None
            if layout.stats is not None and role == "key":
                rows, weights = rows * layout.stats.widths.unsqueeze(2), layout.stats.weights
            decoded = codec.encode(rows, role, weights=weights).decode()
            if weights is not None:
                decoded = decoded * layout.stats.narrowing.unsqueeze(2)
            decoded = decoded[0].transpose(0, 1)
            coded[a + exact : a + GROUP] = decoded[exact:]
    out = torch.zeros_like(q)
    for i in range(len(q)):
        own = i // GROUP * GROUP
        keys, values = torch.cat((coded_k[:own], k[own : i + 1])), torch.cat((coded_v[:own], v[own : i + 1]))
        low = 0 if window is None else max(0, i - window + 1)
        for h in range(q.shape[1]):
            scores = keys[low:, h // shared] @ q[i, h] * q.shape[2] ** -0.5
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if drains is not None:
                scores = torch.cat((scores, drains[h : h + 1]))
            weights = scores.softmax(0)[: len(keys) - low]
            out[i, h] = weights @ values[low:, h // shared]
    return out


def _stats(kv_heads: int, dim: int) -> KeyStats:
    # Widths of a quarter to four, and every possible weight.
    return KeyStats((8 * torch.randint(17, 26, (1, kv_heads, dim)) + torch.randint(0, 8, (1, kv_heads, dim))).to(torch.uint8))


def close(got: Tensor, wanted: Tensor, tolerance: float = 2e-4) -> None:
    assert (got.float() - wanted.float()).abs().max() <= tolerance * wanted.float().abs().max()


@pytest.mark.parametrize("backend", LEVELS)
def test_a_step_gives_what_a_loop_over_tokens_gives(backend: str) -> None:
    engine = Engine.make([130, 5, 64, 200])
    for r, got in enumerate(engine.serve([200, 200, 200, 200], backend=backend)):
        close(got, plain(engine, r))


@pytest.mark.parametrize("backend", LEVELS)
@pytest.mark.parametrize(
    "options",
    [
        {"heads": 4, "kv_heads": 4, "dim": 32, "sink": 0, "pages": 1},
        {"heads": 5, "kv_heads": 1, "dim": 128, "sink": 1, "spec": "hqmq:3"},
        {"heads": 2, "kv_heads": 2, "dim": 80, "spec": "hqmq:5", "ring": 2 * GROUP},
        {"heads": 4, "kv_heads": 2, "spec": "hqmq:s96_r4", "pages": 4},
        {"heads": 4, "kv_heads": 2, "sink": 63},
        {"spec": "hqmq:k4.5v3"},
        {"spec": "(k=hqmq:s96_r4,v=hqmq:3)"},
        {"spec": "(k=hqmq:4,v=hqmq:s96_r4)", "stats": True},
        {"stats": True},
        {"dim": 128, "spec": "hqmq:k5v3", "stats": True},
        {"heads": 4, "kv_heads": 2, "dim": 80, "spec": "q4_0"},
        {"spec": "q8_0", "sink": 0, "pages": 1},
        {"spec": "kivi:3", "dim": 36},
        {"spec": "int:3"},
        {"spec": "scalar:4"},
        {"spec": "(k=fp8:scaled,v=kivi:4)"},
        {"spec": "(k=kivi:4,v=hqmq:3)"},
    ],
    ids=str,
)
def test_shapes_and_codecs(backend: str, options: dict) -> None:
    engine = Engine.make([70, 131], **options)
    for r, got in enumerate(engine.serve([33, 50], backend=backend)):
        close(got, plain(engine, r))


@pytest.mark.parametrize("backend", LEVELS)
@pytest.mark.parametrize("window", [1, 40, 64, 100])
def test_a_window_hides_what_is_older(backend: str, window: int) -> None:
    engine = Engine.make([150, 90])
    for r, got in enumerate(engine.serve([70, 1], backend=backend, window=window)):
        close(got, plain(engine, r, window=window))


@pytest.mark.parametrize("backend", LEVELS)
def test_capped_scores_and_logits_that_drain(backend: str) -> None:
    engine = Engine.make([150])
    drains = torch.randn(6) * 3
    close(engine.serve([40], backend=backend, softcap=3.0, drains=drains)[0], plain(engine, 0, softcap=3.0, drains=drains))


@pytest.mark.parametrize("backend", LEVELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(backend: str, dtype: torch.dtype) -> None:
    engine = Engine.make([140, 66], dtype=dtype)
    for r, got in enumerate(engine.serve([64, 3], backend=backend)):
        assert got.dtype == dtype
        close(got, plain(engine, r), 1e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("backend", LEVELS)
def test_the_way_into_steps_changes_nothing(backend: str) -> None:
    engine = Engine.make([200, 131])
    whole = engine.serve([200, 200], backend=backend)
    for sizes in ([1, 64], [65, 7], [128, 63]):
        for a, b in zip(engine.serve(sizes, backend=backend), whole, strict=True):
            close(a, b, 1e-5 if backend == "reference" else 1e-4)


@pytest.mark.skipif(triton.missing() is not None, reason=str(triton.missing()))
@pytest.mark.parametrize(
    "options", [{}, {"window": 40, "softcap": 3.0, "drains": torch.tensor([1.0, -2.0])}], ids=["plain", "all"]
)
def test_triton(options: dict) -> None:
    stats = bool(options)
    engine = Engine.make([70], heads=2, kv_heads=1, dim=16, sink=3, stats=stats, spec="hqmq:k4v3" if stats else "hqmq:4")
    for r, got in enumerate(engine.serve([66], backend="triton", **options)):
        close(got, plain(engine, r, **options), 2e-3)


@pytest.mark.skipif(triton.missing() is not None, reason=str(triton.missing()))
@pytest.mark.parametrize(
    ("spec", "dim", "sink"),
    [
        ("scalar:4", 20, 3),
        ("(k=int:8,v=hqmq:3)", 20, 0),
        ("(k=fp8,v=q4_0)", 32, 1),
        ("kivi:4", 20, 40),
        ("(k=kivi:4,v=q8_0)", 32, 3),
    ],
)
def test_triton_reads_codes_of_single_numbers(spec: str, dim: int, sink: int) -> None:
    """In kivi the tokens of half a page share scales of key channels, and sinks may fill that half."""
    engine = Engine.make([70], heads=2, kv_heads=1, dim=dim, sink=sink, spec=spec)
    for r, got in enumerate(engine.serve([66], backend="triton")):
        close(got, plain(engine, r), 2e-3)


@pytest.mark.skipif(cpu.MISSING is not None, reason=str(cpu.MISSING))
def test_threads_and_long_contexts_that_are_cut_change_nothing() -> None:
    engine = Engine.make([3000, 70])
    last = [(2999, 3000), (69, 70)]
    engine.step([(0, 2999), (0, 69)], "cpu")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = engine.step(last, "cpu")
        torch.set_num_threads(4)
        four = engine.step(last, "cpu")
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(one, four, strict=True):
        close(a, b, 1e-5)


@pytest.mark.parametrize("backend", LEVELS)
def test_tokens_that_were_drafted_in_vain_leave_no_trace(backend: str) -> None:
    engine = Engine.make([150], ring=2 * GROUP)
    wanted = engine.serve([150], backend=backend)[0]
    right = engine.q[0], engine.k[0], engine.v[0]
    wrong = tuple(torch.randn_like(x) for x in right)
    done, got = 0, []
    while done < 150:
        end = min(150, done + 30)
        keep = min(end, done + 7)
        # Tokens after `keep` are rejected drafts, which the next step overwrites.
        for i, x in enumerate((engine.q, engine.k, engine.v)):
            x[0] = torch.cat((right[i][:keep], wrong[i][keep:]))
        got.append(engine.step([(done, end)], backend)[0][: keep - done])
        done = keep
    close(torch.cat(got), wanted, 1e-4)


def test_pages_that_are_shared_read_the_same() -> None:
    engine = Engine.make([200, 200])
    engine.q[1], engine.k[1], engine.v[1] = engine.q[0], engine.k[0], engine.v[0]
    whole = engine.serve([200, 200], backend="auto")
    # The second request shares the first block of the other, and starts after it with arbitrary contents of its ring.
    engine.table[1, 0] = engine.table[0, 0]
    engine.ring.random_(0, 256)
    assert torch.equal(engine.step([(0, 0), (128, 200)], "auto")[1], whole[1][128:])


@pytest.mark.skipif(cpu.MISSING is not None, reason=str(cpu.MISSING))
def test_the_kernels_gather_and_keep_what_the_definition_does() -> None:
    engine = Engine.make([150, 64])
    engine.serve([50, 50], backend="cpu")
    step = Step(torch.tensor([0, 100, 164]).int(), torch.tensor([150, 64]).int(), engine.table, engine.rings, {})
    k, v = (torch.cat((x[0][50:150], x[1])) for x in (engine.k, engine.v))
    wanted = paged.collect(k, v, engine.ring, engine.layout, step)
    got = dispatch.collect(k, v, engine.pool, engine.ring, engine.layout, step, backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    ring = engine.ring.clone()
    paged.fill_rings(k, v, ring, engine.layout, step)
    q = torch.randn(164, 6, 64)
    call = PagedCall(q, k, v, engine.pool, engine.ring, engine.layout, step, 0.1)
    dispatch.attend_paged(call, out=torch.empty_like(q), backend="cpu")
    assert torch.equal(engine.ring, ring)


@pytest.mark.skipif(cpu.MISSING is not None, reason=str(cpu.MISSING))
def test_a_table_that_names_no_block_is_refused() -> None:
    engine = Engine.make([150])
    engine.serve([150], backend="cpu")
    engine.table[0, 0] = len(engine.pool)
    with pytest.raises(ValueError, match="names no block"):
        engine.step([(149, 150)], "cpu")


def test_bytes_of_a_block() -> None:
    layout = block_layout(codecs.get("hqmq:4"), 64, torch.bfloat16, pages=2, sink=4)
    # 32 bytes of codes and one of scale for each key and value, means of 64 channels for each 64 keys.
    assert layout.page_bytes == 64 * (32 + 1) * 2 + 64 * 2
    assert layout.sink_offset == 2 * layout.page_bytes
    assert layout.nbytes == layout.token_bytes * 128 >= layout.sink_offset + 4 * 64 * 2 * 2
    assert layout.nbytes - (layout.sink_offset + 4 * 64 * 2 * 2) < 128


def test_codecs_without_pages_of_one_size_are_refused() -> None:
    with pytest.raises(ValueError, match="another number of bytes"):
        block_layout(codecs.get("hqmq:s96_r4_med3"), 64, torch.float32, pages=2)
    with pytest.raises(ValueError, match="no kernel"):
        block_layout(NoKernel(), 64, torch.float32, pages=2)


def test_pages_hold_what_the_codec_keeps() -> None:
    codec = codecs.get("hqmq:4")
    layout = block_layout(codec, 64, torch.float32, pages=2)
    pool = torch.zeros(3, 2, layout.nbytes, dtype=torch.uint8)
    k, v = torch.randn(2, 2, 2, GROUP, 64)
    write(codec, layout, pool, torch.tensor([2, 0]), torch.tensor([1, 0]), k, v, torch.zeros(2, dtype=torch.bool))
    views = layout.views(pool)
    for role, x in (("key", k), ("value", v)):
        for name, wanted in codec.encode(x, role).tensors.items():
            assert torch.equal(views[role][name][[2, 0], :, [1, 0]], wanted)
