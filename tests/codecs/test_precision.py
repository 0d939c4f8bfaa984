"""Autocast and torch's default dtype do not change results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from codec_fixtures import ROLES, SPECS, gaussian, pairwise
from safetensors.torch import load_file
from torch import Tensor

from tessera.codecs import Role, get
from tessera.kernels import AttendParams, CompressedKV, dispatch, reference
from tessera.kernels.nearest import brute_force, build_index, nearest
from tessera.quaternion import hamilton, units

HALVES = (torch.bfloat16, torch.float16)


def kept(spec: str, x: Tensor, role: Role) -> dict[str, Tensor]:
    """Return what a new codec stores for x, and the decoded result."""
    packed = get(spec).encode(x, role, layer=1)
    return {**packed.tensors, "decoded": packed.decode()}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        x.dtype == wanted[name].dtype and torch.equal(x, wanted[name]) for name, x in found.items()
    )


@pairwise(spec=SPECS, role=ROLES, backend=("auto", "reference"))
def test_autocast_changes_no_bit(spec: str, role: Role, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_BACKEND", backend)
    x = gaussian(tokens=20)
    for given in (x, x.bfloat16()):
        wanted = kept(spec, given, role)
        for dtype in HALVES:
            with torch.autocast("cpu", dtype):
                assert same(kept(spec, given, role), wanted)
        assert same(kept(spec, given, role), wanted)


@pytest.mark.parametrize("spec", ["hqmq:3", "q4_0", "scalar:3", "hqmq:o21_r3"])
def test_what_is_encoded_under_autocast_is_decoded_without_and_the_other_way_round(spec: str) -> None:
    x = gaussian(tokens=20)
    wanted = kept(spec, x, "key")["decoded"]
    with torch.autocast("cpu", torch.bfloat16):
        inside = get(spec).encode(x, "key", 1)
    assert torch.equal(inside.decode(), wanted)
    outside = get(spec).encode(x, "key", 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(outside.decode(), wanted)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_attention_over_packed_and_exact_tokens_is_in_float32_under_autocast(backend: str) -> None:
    q, k, v = gaussian(2, 4, 90), gaussian(2, 2, 128), gaussian(2, 2, 128)
    pages = CompressedKV([(get("hqmq:3").encode(k, "key"), get("hqmq:3").encode(v, "value"))])
    run = {
        "packed": lambda: dispatch.attend(q, pages, AttendParams(0.2), backend=backend),
        "exact": lambda: dispatch.attend_exact(q, k, v, AttendParams(0.2), backend=backend),
        "definition": lambda: reference.attend_exact(q, k, v, AttendParams(0.2)),
    }
    for name, attend in run.items():
        wanted = attend()
        with torch.autocast("cpu", torch.bfloat16):
            found = attend()
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), name


def test_the_search_for_codewords_is_in_float32_under_autocast() -> None:
    x = torch.randn(500, 4)
    words = hamilton(units(), torch.randn(40, 1, 4)).reshape(-1, 4)
    index = build_index(words, False)
    with torch.autocast("cpu", torch.bfloat16):
        inside = build_index(words, False)
        found = nearest(x, inside), brute_force(x, words)
    assert all(torch.equal(getattr(inside, name), tensor) for name, tensor in vars(index).items() if isinstance(tensor, Tensor))
    assert torch.equal(found[0], nearest(x, index))
    assert torch.equal(found[1], brute_force(x, words))


#: One small table of every kind.
TABLES = ("hqmq:2", "hqmq:o21_r3", "hqmq:s24_r3_med3", "q4_0", "scalar:3", "kivi:2", "int:3", "fp8:scaled")
PROGRAM = """
import sys, torch
from safetensors.torch import load_file, save_file
torch.set_default_dtype(getattr(torch, sys.argv[1]))
from tessera.codecs import get
x, found = load_file(sys.argv[2])["x"], {}
with torch.autocast("cpu", torch.bfloat16, enabled=sys.argv[1] == "float32"):
    for spec in sys.argv[4:]:
        for role in ("key", "value"):
            packed = get(spec).encode(x, role, layer=1)
            for name, tensor in {**packed.tensors, "decoded": packed.decode()}.items():
                found[f"{spec}/{role}/{name}"] = tensor.contiguous()
save_file(found, sys.argv[3])
"""


@pytest.mark.parametrize(
    ("default", "backend"), [("float32", "auto"), ("bfloat16", "reference"), ("float16", "auto"), ("float64", "auto")]
)
def test_tables_made_in_another_default_dtype_or_under_autocast_are_the_same(
    default: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test runs in a separate process, in which every table is made for the first time."""
    from safetensors.torch import save_file

    monkeypatch.setenv("TESSERA_BACKEND", backend)
    x = gaussian(tokens=40)
    save_file({"x": x}, tmp_path / "x")
    subprocess.run([sys.executable, "-c", PROGRAM, default, tmp_path / "x", tmp_path / "found", *TABLES], check=True)
    found = load_file(tmp_path / "found")
    wanted = {
        f"{spec}/{role}/{name}": tensor for spec in TABLES for role in ROLES for name, tensor in kept(spec, x, role).items()
    }
    assert same(found, wanted)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("spec", SPECS)
def test_what_a_codec_says_that_it_keeps_is_what_it_keeps(spec: str, role: Role) -> None:
    for dim in (32, 36, 5):
        codec = get(spec)
        packed = codec.encode(gaussian(dim=dim, tokens=9), role)
        said = codec.kept(2, dim, role)
        assert said.keys() == packed.tensors.keys()
        for name, (shape, dtype) in said.items():
            kept_tensor = packed.tensors[name]
            assert tuple(kept_tensor.shape[1 if codec.fields[name] == "ragged" else 3 :]) == shape
            assert kept_tensor.dtype == dtype
