"""The bytes of a plan equal the report of a cache that has read the tokens."""

from __future__ import annotations

import pytest
import torch
from cache_fixtures import GROUPED
from cache_models import FAMILIES, make, tokens

import tessera
from tessera.cache.model_config import read_config
from tessera.planning.held import Held, held, steady_after
from tessera.tiers.per_layer import parse

SPECS = [
    "dense",
    "window:50",
    "sink:4 + window:100",
    "sink:4 + hqmq:4 + recent:128",
    "hqmq:3 + recent:20",
    "sink:4 + hqmq:4@128 + recent:16",
    "sink:4 + hqmq:k4.5v3.5 + recent:100",
    "sink:4 + (k=q8_0,v=hqmq:3)@256 + recent:30",
    "sink:200 + q4_0",
    "kivi:4 + recent:16",
    f"sink:1 + {GROUPED}@256 + recent:3",
    "sink:4 + hqmq:4@128 + hqmq:3 + recent:16",
    "hqmq:4@64 + kivi:4@128 + q4_0@64 + recent:8",
    "sink:2 + hqmq:4/top:128 + recent:16",
    "{0: sink:4 + hqmq:5 + recent:16; *: hqmq:3@128 + recent:20}",
]
SOME = ["llama", "mistral", "qwen2-sliding", "gemma3", "gpt-neox"]
#: Lengths around the first tokens, the 128 for statistics, blocks of 64 after sinks and `recent`, windows, and pages of 1,024.
LENGTHS = (1, 5, 64, 65, 127, 128, 131, 132, 133, 196, 197, 700)


def really(spec: str, model: object, rows: int, count: int, cuts: tuple[int, ...] | None = None) -> tessera.Cache:
    cache = tessera.Cache(spec, model)
    with torch.inference_mode():
        for part in tokens(rows, count).split(list(cuts or (count,)), dim=1):
            model(part, past_key_values=cache, use_cache=True)  # type: ignore[operator]
    return cache


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("spec", SPECS)
def test_bytes_are_those_of_a_real_cache(spec: str, family: str) -> None:
    model = make(family)
    layers = read_config(model.config)[1]
    for number, count in enumerate(LENGTHS):
        rows = 1 + number % 2
        report = really(spec, model, rows, count).report()
        found = held(parse(spec), layers, torch.float32, rows, [count])[count]
        assert found.nbytes == report.nbytes, (count, rows)
        assert found.read <= report.nbytes


@pytest.mark.parametrize(
    ("spec", "family", "count"),
    [
        ("sink:4 + hqmq:4 + recent:128", "llama", 5000),
        ("sink:4 + hqmq:3@1000 + recent:16", "gemma3", 6100),
        ("sink:4 + window:300", "qwen2-sliding", 5121),
        ("dense", "mistral", 4700),
        ("kivi:4 + recent:16", "gpt-neox", 4097),
    ],
)
def test_bytes_of_long_texts_are_those_of_a_real_cache_in_bfloat16(spec: str, family: str, count: int) -> None:
    """The texts are so long that pages are no longer counted one by one; they are read in calls of whole pages."""
    model = make(family, torch.bfloat16)
    layers = read_config(model.config)[1]
    cuts = (*(1024,) * (count // 1024), *((count % 1024,) if count % 1024 else ()))
    report = really(spec, model, 1, count, cuts).report()
    assert held(parse(spec), layers, torch.bfloat16, 1, [count])[count].nbytes == report.nbytes
    assert count > steady_after(parse(spec), layers)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_what_is_reckoned_is_what_page_by_page_would_be(spec: str, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layers: list[tuple[tuple[int, int], int | None]] = [((8, head_dim), None), ((8, head_dim), 4096), ((2, head_dim), None)]
    lengths = (20_000, 20_480, 20_543, 33_333)
    quick = held(parse(spec), layers, torch.bfloat16, 3, lengths)
    monkeypatch.setattr("tessera.planning.held.steady_after", lambda *_: 1 << 30)
    assert held(parse(spec), layers, torch.bfloat16, 3, lengths) == quick


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_counted(family: str) -> None:
    model = make(family)
    layers = read_config(model.config)[1]
    spec = "sink:4 + hqmq:4 + recent:16"
    assert held(parse(spec), layers, torch.float32, 2, [300])[300].nbytes == really(spec, model, 2, 300).report().nbytes


def test_what_is_read_is_what_is_held_without_free_room() -> None:
    layers: list[tuple[tuple[int, int], int | None]] = [((2, 16), None)]
    token = 2 * 2 * 16 * 4
    assert held(parse("dense"), layers, torch.float32, 1, [70])[70] == Held(80 * token, 70 * token)


def test_a_codec_whose_bytes_depend_on_the_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="depend on the numbers"):
        held(parse("hqmq:s96_r4_med3"), [((2, 16), None)], torch.float32, 1, [300])


def test_sparse_reading_reads_the_best_blocks_and_the_summaries_of_the_others() -> None:
    layers: list[tuple[tuple[int, int], int | None]] = [((8, 64), None)]
    specs = (parse(f"hqmq:4{top}") for top in ("", "/top:640"))
    everything, best = (held(spec, layers, torch.bfloat16, 1, [6400])[6400] for spec in specs)
    assert best.nbytes == everything.nbytes
    codes, value_scales = 2 * 8 * 6400 * 32, 8 * 6400
    assert everything.read - best.read == (codes + value_scales) * 9 // 10
