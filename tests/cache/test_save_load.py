"""`Cache.load` restores what `cache.save` wrote, or refuses it with a clear message."""

from __future__ import annotations

import copy
import functools
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_fixtures import GROUPED
from cache_models import logits, make, padding, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import tessera
from tessera.cache import cache_file

SPECS = [
    "dense",
    "sink:4 + window:50",
    "sink:4 + hqmq:4 + recent:16",
    "sink:4 + hqmq:s96_r4_med3@128 + recent:30",
    "sink:4 + hqmq:k4v3 + recent:16",
    "(k=q8_0,v=hqmq:s24_r2_med3)@128 + recent:16",
    "kivi:4 + recent:16",
    f"sink:1 + {GROUPED}@256 + recent:3",
    "q4_0",
]
PACKED = SPECS[2]


#: The last row has read only padding when the cache is saved.
PADS = (90, 0, 300)
LATER = (70, 1, 1, 8)


def filled(spec: str, model: Any, **kwargs: Any) -> tessera.Cache:
    """Make a cache that has read 300 slots of three rows."""
    cache = tessera.Cache(spec, model, **kwargs)
    logits(model, cache, tokens(3, 300), (300,), padding(PADS, 300))
    return cache


def go_on(model: Any, cache: tessera.Cache, ids: Tensor) -> Tensor:
    """Return the logits of some further calls."""
    return logits(model, cache, ids, LATER, padding(PADS, 300 + sum(LATER)))


@pytest.mark.parametrize("prefill", ["exact", "quantized"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
@pytest.mark.parametrize("spec", SPECS)
def test_a_loaded_cache_goes_on_as_the_saved_one(spec: str, family: str, prefill: Any, tmp_path: Path) -> None:
    model = make(family)
    cache = filled(spec, model, prefill=prefill)
    cache.save(tmp_path / "cache.safetensors")
    loaded = tessera.Cache.load(tmp_path / "cache.safetensors", model)
    assert (loaded.spec, loaded.prefill, loaded.get_seq_length()) == (cache.spec, prefill, 300)
    assert loaded.report().elements == cache.report().elements
    assert loaded.report().tiers.get(cache.spec.codec or "") == cache.report().tiers.get(cache.spec.codec or "")
    more = tokens(3, sum(LATER))
    assert torch.equal(go_on(model, loaded, more), go_on(model, cache, more))
    assert {layer.seen for layer in loaded.layers} == {380}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make("llama", dtype)
    cache = filled(PACKED, model)
    cache.save(tmp_path / "cache.safetensors")
    loaded = tessera.Cache.load(tmp_path / "cache.safetensors", model)
    assert loaded.layers[0].dtype == dtype
    more = tokens(3, sum(LATER))
    assert torch.equal(go_on(model, loaded, more), go_on(model, cache, more))


def test_generation_goes_on_identically(tmp_path: Path) -> None:
    model = make()
    cache = tessera.Cache(PACKED, model)
    first = model.generate(tokens(2, 200), past_key_values=cache, max_new_tokens=30)
    cache.save(tmp_path / "cache.safetensors")
    prompt = torch.cat([first, tokens(2, 40)], 1)
    second = [
        model.generate(prompt, past_key_values=each, max_new_tokens=60)
        for each in (cache, tessera.Cache.load(tmp_path / "cache.safetensors", model))
    ]
    assert torch.equal(*second)


def test_an_empty_cache_can_be_saved(tmp_path: Path) -> None:
    model = make()
    tessera.Cache(PACKED, model).save(tmp_path / "cache.safetensors")
    loaded = tessera.Cache.load(tmp_path / "cache.safetensors", model)
    ids = tokens(1, 100)
    assert torch.equal(logits(model, loaded, ids, (100,)), logits(model, tessera.Cache(PACKED, model), ids, (100,)))


def test_saving_changes_nothing(tmp_path: Path) -> None:
    model = make()
    cache = filled(PACKED, model)
    untouched = copy.deepcopy(cache)
    cache.save(tmp_path / "new folder" / "cache.safetensors")
    assert cache.report() == untouched.report()
    more = tokens(3, sum(LATER))
    assert torch.equal(go_on(model, cache, more), go_on(model, untouched, more))


def test_a_config_is_enough_to_load(tmp_path: Path) -> None:
    model = make()
    cache = filled(PACKED, model)
    cache.save(tmp_path / "cache.safetensors")
    assert (
        tessera.Cache.load(tmp_path / "cache.safetensors", model.config).report()
        == tessera.Cache.load(tmp_path / "cache.safetensors", model).report()
    )


def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    path = tmp_path / "cache.safetensors"
    filled(PACKED, model).save(path)
    before = path.read_bytes()

    def interrupted(tensors: Any, to: Path, header: Any) -> None:
        to.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(cache_file, "save_file", interrupted)
    with pytest.raises(OSError, match="no space left"):
        filled("dense", model).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_holds_no_code(tmp_path: Path) -> None:
    """A file has plain tensors and JSON, which safetensors reads without Tessera."""
    cache = filled(PACKED, make())
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    held = sum(t.numel() * t.element_size() for t in load_file(path).values())
    assert 0.3 * cache.report().nbytes < held <= cache.report().nbytes
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["tessera_cache"])["spec"] == PACKED


# Refusals


@pytest.fixture(scope="module", params=["sink:4 + kivi:4 + recent:16", "sink:4 + hqmq:s96_r4_med3 + recent:16"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save caches of a two-layer Llama with codecs whose stored fields differ for keys, values and groups."""
    path = tmp_path_factory.mktemp("saved") / "cache.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        filled(request.param, make()).save(path)
    return path


@functools.cache
def config(**changes: Any) -> Any:
    return make(**changes).config


def test_the_file_that_is_damaged_below_can_be_loaded(saved: Path) -> None:
    assert load(saved).get_seq_length() == 300


def load(path: Path, **changes: Any) -> tessera.Cache:
    return tessera.Cache.load(path, config(**changes))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        load(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 3}, ["2 layers", "yours has 3"]),
        ({"num_key_value_heads": 4}, ["layer 0", "[2, 16]", "[4, 16]"]),
        ({"head_dim": 32}, ["layer 0", "[2, 16]", "[2, 32]"]),
        ({"family": "mistral"}, ["sliding window None", "80"]),
    ],
)
def test_another_model_is_refused(saved: Path, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"cache\.safetensors") as error:
        load(saved, **changes)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused(saved: Path, keep: float, tmp_path: Path) -> None:
    content = saved.read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match=r"cut\.safetensors is no saved cache"):
        load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    text, weights = tmp_path / "text.safetensors", tmp_path / "weights.safetensors"
    text.write_text("hello " * 100, encoding="utf-8")
    save_file({"weight": torch.zeros(3)}, weights)
    with pytest.raises(ValueError, match=r"text\.safetensors is no saved cache"):
        load(text)
    with pytest.raises(ValueError, match="is no saved cache: it has no 'tessera_cache' header"):
        load(weights)


def rewritten(saved: Path, path: Path, header: str | None = None, tensors: dict[str, Tensor] | None = None) -> Path:
    """Write a copy with another header or other tensors."""
    with safe_open(saved, "pt") as file:
        old = file.metadata()["tessera_cache"]
    save_file(load_file(saved) if tensors is None else tensors, path, {"tessera_cache": old if header is None else header})
    return path


def header_of(saved: Path) -> dict[str, Any]:
    with safe_open(saved, "pt") as file:
        header: dict[str, Any] = json.loads(file.metadata()["tessera_cache"])
    return header


def test_a_later_format_is_refused(saved: Path, tmp_path: Path) -> None:
    header = header_of(saved) | {"format": 99}
    with pytest.raises(ValueError, match="has format 99; this version reads formats 1 to 4"):
        load(rewritten(saved, tmp_path / "new.safetensors", json.dumps(header)))


@pytest.mark.parametrize("header", ["", "{", "[]", "null", '{"format": 1}', '{"format": 1, "spec": 3, "prefill": "exact"}'])
def test_a_garbled_header_is_refused(saved: Path, header: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bad\.safetensors"):
        load(rewritten(saved, tmp_path / "bad.safetensors", header))


def test_an_unknown_codec_is_named(saved: Path, tmp_path: Path) -> None:
    header = header_of(saved) | {"spec": "sink:4 + nosuch:4 + recent:16"}
    with pytest.raises(ValueError, match="unknown tier 'nosuch'"):
        load(rewritten(saved, tmp_path / "bad.safetensors", json.dumps(header)))


def test_another_spec_than_the_tensors_is_refused(saved: Path, tmp_path: Path) -> None:
    for spec in ("dense", "sink:4 + hqmq:3 + recent:16", "sink:2 + hqmq:4 + recent:16"):
        header = header_of(saved) | {"spec": spec}
        with pytest.raises(ValueError, match=r"bad\.safetensors"):
            load(rewritten(saved, tmp_path / "bad.safetensors", json.dumps(header)))


def test_keys_and_values_of_each_others_codecs_are_refused(tmp_path: Path) -> None:
    filled("sink:4 + hqmq:k4v3 + recent:16", make()).save(tmp_path / "saved.safetensors")
    saved = tmp_path / "saved.safetensors"
    for spec, words in (
        ("sink:4 + hqmq:k3v4 + recent:16", "encoded by 'hqmq:4', not by 'hqmq:k3v4'"),
        ("sink:4 + hqmq:4 + recent:16", "encoded by 'hqmq:3', not by 'hqmq:4'"),
    ):
        with pytest.raises(ValueError, match=words):
            load(rewritten(saved, tmp_path / "bad.safetensors", json.dumps(header_of(saved) | {"spec": spec})))


def test_missing_and_unknown_tensors_are_named(saved: Path, tmp_path: Path) -> None:
    tensors = load_file(saved)
    for name in tensors:
        fewer = {key: tensor for key, tensor in tensors.items() if key != name}
        with pytest.raises(ValueError, match=r"bad\.safetensors"):
            load(rewritten(saved, tmp_path / "bad.safetensors", tensors=fewer))
    more = tensors | {"stranger": torch.zeros(1)}
    with pytest.raises(ValueError, match="stranger"):
        load(rewritten(saved, tmp_path / "bad.safetensors", tensors=more))


def test_tensors_of_another_shape_or_dtype_are_refused(saved: Path, tmp_path: Path) -> None:
    tensors = load_file(saved)
    for name, tensor in tensors.items():
        for wrong in (tensor[:-1], tensor[..., :-1], tensor.unsqueeze(0), tensor.flatten(), tensor.double()):
            if (wrong.shape, wrong.dtype) == (tensor.shape, tensor.dtype):
                continue
            changed = tensors | {name: wrong.clone()}
            with pytest.raises(ValueError, match=r"bad\.safetensors"):
                load(rewritten(saved, tmp_path / "bad.safetensors", tensors=changed))


def test_flags_that_ask_for_other_rows_than_there_are_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    filled("sink:4 + hqmq:s96_r4_med3 + recent:16", make()).save(path)
    tensors = load_file(path)
    for name in (name for name in tensors if name.endswith(".flags")):
        changed = tensors | {name: tensors[name] ^ 1}
        with pytest.raises(ValueError, match=r"bad\.safetensors.*field 'kept' of shape"):
            load(rewritten(path, tmp_path / "bad.safetensors", tensors=changed))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Yield the path of every value in nested dicts and lists."""
    found = [path] if path else []
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        found += places(child, (*path, key))
    return found


def test_no_lie_in_the_header_gets_through(saved: Path, tmp_path: Path) -> None:
    """If any value of the header is replaced or missing, a ValueError names the file."""
    header = header_of(saved)
    wrong: list[Any] = [None, -1, 3, 10**9, True, "", "float64", [], {}, "1,2,3,4", "missing"]
    survived = []
    for path in places(header):
        if path[:2] == ("layers", 1):  # like the first
            continue
        for value in wrong:
            broken = copy.deepcopy(header)
            parent: Any = broken
            for key in path[:-1]:
                parent = parent[key]
            if value == "missing":
                old = parent.pop(path[-1])
            else:
                old, parent[path[-1]] = parent[path[-1]], value
            if value == old or (value == "missing" and old is None):
                continue
            try:
                load(rewritten(saved, tmp_path / "bad.safetensors", json.dumps(broken)))
            except ValueError as error:
                assert "bad.safetensors" in str(error)  # noqa: PT017
            else:
                survived.append((path, value))
    assert survived == []


def test_a_length_that_overruns_the_file_is_refused(saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", 10**12) + content[8:])
    with pytest.raises(ValueError, match=r"bad\.safetensors is no saved cache"):
        load(path)
