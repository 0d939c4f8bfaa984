"""Results do not depend on how calls are split, on other rows, on padding, or on later tokens."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from cache_fixtures import GROUPED
from cache_models import CUTS, logits, make, padding, relative, tokens
from torch import Tensor

import tessera
from tessera import codecs
from tessera.attention import attention_forward
from tessera.cache import BLOCK
from tessera.codecs import Packed
from tessera.kernels import CompressedKV

TOTAL = sum(CUTS)
EXACT = ["dense", "sink:4 + window:50", "window:50"]
LOSSY = [
    "sink:4 + hqmq:4 + recent:32",
    "hqmq:4@128 + recent:16",
    f"sink:3 + {GROUPED} + recent:20",
    "kivi:4 + recent:64",
    "(k=q8_0,v=hqmq:4) + recent:32",
    "q4_0",
]
ALL = EXACT + LOSSY
#: One specification of each kind of codec.
KINDS = [GROUPED, "hqmq:3", "hqmq:s96_r4_med3", "q4_0", "fp8:scaled", "int:4", "kivi:4", "scalar:4", "hqmq:k4v3"]


def feed(cache: tessera.Cache, k: Tensor, v: Tensor, cuts: list[int]) -> None:
    """Add keys and values to a cache without a model. k, v: (layers, batch, kv_heads, tokens, head_dim)."""
    for keys, values in zip(k.split(cuts, 3), v.split(cuts, 3), strict=True):
        for layer in range(len(k)):
            deferred = cache.update(keys[layer], values[layer], layer)
            query = keys[layer].repeat_interleave(2, 1)
            attention_forward(torch.nn.Module(), query, *deferred, None)


def tolerance(spec: str) -> float:
    """Return the maximum difference of results where packed tokens are read instead of exact ones."""
    return 1e-5 if spec in EXACT else 0.02 if GROUPED in spec else 0.2


def contents(cache: tessera.Cache) -> list[Tensor | Packed]:
    """Return everything that is stored, without free space, joined over pages."""
    parts = [part.held for layer in cache.layers for group in layer.groups for part in group.chain.sources()]
    return [x for held in parts for x in (joined(held) if isinstance(held, CompressedKV) else held)]


def joined(held: CompressedKV) -> list[Packed]:
    keys, values = zip(*held.pages, strict=True)
    return [Packed.cat(list(packed)) for packed in (keys, values)]


@pytest.mark.parametrize("spec", [*EXACT, *(f"sink:4 + {codec} + recent:32" for codec in KINDS)])
def test_what_is_held_does_not_depend_on_the_cut(spec: str) -> None:
    model = make()
    k, v = torch.randn(2, 2, 2, 2, 700, 16)
    k[torch.rand_like(k) < 0.001] *= 30  # outliers, which some codecs store separately
    held = []
    for cuts in ([700], [1] * 200 + [500], [64] * 10 + [60], torch.randint(1, 40, (15,)).tolist()):
        cache = tessera.Cache(spec, model)
        feed(cache, k, v, [*cuts, 700 - sum(cuts)] if sum(cuts) < 700 else cuts)
        held.append(contents(cache))
    for other in held[1:]:
        for found, wanted in zip(other, held[0], strict=True):
            if isinstance(wanted, Packed):
                assert isinstance(found, Packed)
                # Rotating more tokens at once rounds differently, which may change single codes.
                for name, tensor in wanted.tensors.items():
                    assert (found.tensors[name] != tensor).sum() <= 0.002 * tensor.numel()
            else:
                assert torch.equal(found, wanted)


@pytest.mark.parametrize("codec", ["hqmq:s96_r4_med3", "(k=hqmq:s24_r2_med3,v=q8_0)", "hqmq:s24_r4_med3_authors"])
def test_a_median_is_taken_over_the_same_tokens_whatever_was_before_and_however_it_came(codec: str) -> None:
    """This holds after a crop, a reset, and with another cache of the same codec, too."""
    model, total = make(), 460
    k, v = torch.randn(2, 2, 2, 2, total + 64, 16) * torch.logspace(-2, 2, total + 64)[:, None]
    spec = f"sink:4 + {codec} + recent:32"

    def held(cache: tessera.Cache, first: int, cuts: list[int]) -> list[Packed]:
        feed(cache, k[:, :, :, first : first + sum(cuts)], v[:, :, :, first : first + sum(cuts)], cuts)
        return [x for x in contents(cache) if isinstance(x, Packed)]

    wanted = held(tessera.Cache(spec, model), 0, [total])
    cropped, reset = tessera.Cache(spec, model), tessera.Cache(spec, model)
    held(cropped, 0, [200])
    cropped.activate_past_recording()
    held(cropped, total, [64])  # other tokens, which are then cropped
    cropped.crop(-64)
    held(reset, 100, [300])
    reset.reset()
    for found in (
        held(tessera.Cache(spec, model), 0, [*[1] * 150, 310]),
        held(cropped, 200, [1, 100, 159]),
        held(reset, 0, [300, 160]),
    ):
        assert len(found) == len(wanted) > 0
        for one, other in zip(found, wanted, strict=True):
            assert all(torch.equal(one.tensors[name], tensor) for name, tensor in other.tensors.items())


@pytest.mark.parametrize(("spec", "prefill"), [*((spec, "exact") for spec in ALL), *((spec, "quantized") for spec in LOSSY)])
def test_logits_hardly_depend_on_the_cut(spec: str, prefill: Any) -> None:
    """Only whether a query reads a token exactly or packed depends on where calls end."""
    model = make()
    ids = tokens(2, 180)
    results = [
        logits(model, tessera.Cache(spec, model, prefill=prefill), ids, cuts)
        for cuts in ((180,), (90, 1, 1, 30, 1, 57), (64, 64, 52), (1,) * 180)
    ]
    for a, b in combinations(results, 2):
        assert relative(a, b) < tolerance(spec)


@pytest.mark.parametrize("prefill", ["exact", "quantized"])
@pytest.mark.parametrize("spec", ALL)
def test_what_other_rows_hold_never_matters(spec: str, prefill: Any) -> None:
    model = make()
    ids = tokens(3, TOTAL)
    others = torch.cat([ids[:1], tokens(2, TOTAL)])
    one, other = (logits(model, tessera.Cache(spec, model, prefill=prefill), x) for x in (ids, others))
    assert torch.equal(one[0], other[0])
    assert not torch.equal(one[1], other[1])


@pytest.mark.parametrize("spec", ALL)
def test_a_row_alone_and_in_a_padded_batch_is_the_same(spec: str) -> None:
    """They are equal up to rounding, which may change single codes."""
    model = make()
    pads = (0, 5, 64, 100, 250)
    ids, steps = tokens(len(pads), TOTAL), (200, 1, 40, 1, 32)
    batch = logits(model, tessera.Cache(spec, model), ids, steps, padding(pads, TOTAL))
    for row, pad in enumerate(pads):
        ends = [max(0, min(sum(steps[: i + 1]), TOTAL) - pad) for i in range(len(steps))]
        cuts = tuple(b - a for a, b in zip([0, *ends], ends, strict=False) if b > a)
        alone = logits(model, tessera.Cache(spec, model), ids[row : row + 1, pad:], cuts)
        assert relative(batch[row : row + 1, pad:], alone) < (1e-5 if spec in EXACT else 2e-3)


@pytest.mark.parametrize("place", [0, 60, 169, 185, 230, TOTAL - 1])
@pytest.mark.parametrize("spec", ALL)
def test_a_later_token_changes_no_earlier_logits(spec: str, place: int) -> None:
    model = make()
    ids = tokens(1, TOTAL)
    changed = ids.clone()
    changed[:, place] = 3 + (ids[:, place] - 2) % 90
    before, after = (logits(model, tessera.Cache(spec, model), x) for x in (ids, changed))
    assert torch.equal(after[:, :place], before[:, :place])
    assert not torch.equal(after[:, place], before[:, place])


@pytest.mark.parametrize("spec", [f"sink:4 + {codec}" for codec in KINDS])
def test_packed_prefill_lets_a_later_token_reach_back_to_the_beginning_of_its_group_at_most(spec: str) -> None:
    """A codec encodes the tokens of a group together, so with packed prefill only a codec without groups is strictly causal."""
    model = make()
    ids = tokens(1, 4 + 3 * BLOCK)
    place = 4 + 2 * BLOCK + 50
    changed = ids.clone()
    changed[:, place] = 3 + (ids[:, place] - 2) % 90
    group = codecs.get(spec.split()[-1]).group
    first = 4 + (place - 4) // group * group
    before, after = (logits(model, tessera.Cache(spec, model, prefill="quantized"), x, (ids.shape[1],)) for x in (ids, changed))
    assert torch.equal(after[:, :first], before[:, :first])
    assert not torch.equal(after[:, place], before[:, place])
