"""Packed tensors of codecs: their bytes, views, concatenation and files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from codec_fixtures import SPECS, Laws, gaussian
from safetensors.torch import load_file, save_file
from torch import Tensor

from tessera.codecs import HQMQ, Packed, Role, get

LAWS = Laws(
    (
        "test_nbytes_counts_every_kept_tensor",
        "test_nothing_outside_the_kept_tensors_is_needed_to_decode",
        "test_a_slice_decodes_to_the_slice",
        "test_parts_join_to_the_whole",
        "test_rows_are_selected_in_the_order_given",
        "test_a_file_gives_back_what_was_saved",
        "test_damaged_tensors_are_refused_by_name",
    ),
)


def packed(spec: str, role: Role = "key", tokens: int = 150, dim: int = 32) -> Packed:
    """Pack two rows and three heads, with a few vectors of zeros and a few giant chunks."""
    x = gaussian(2, 3, tokens, dim)
    x[0, 1, 3] = 0
    x[0, :, ::7, :4] *= 20
    x[1, :, ::5, 4:8] *= 20
    return get(spec).encode(x.half(), role, layer=2)


def close(a: Tensor, b: Tensor) -> None:
    """Whether results are equal up to the last bit, since matrix products of other sizes may sum in another order."""
    torch.testing.assert_close(a, b, atol=1e-4, rtol=2e-3)


def same(a: Packed, b: Packed) -> None:
    assert (a.codec, a.shape, a.dtype, a.role, a.layer, a.offset) == (b.codec, b.shape, b.dtype, b.role, b.layer, b.offset)
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        assert tensor.dtype == b.tensors[name].dtype
        assert torch.equal(tensor, b.tensors[name])


@LAWS
def test_nbytes_counts_every_kept_tensor(spec: str, role: Role) -> None:
    p = packed(spec, role)
    kept = [value for value in vars(p).values() if isinstance(value, torch.Tensor)] + list(p.tensors.values())
    total = sum(t.element_size() * t.numel() for t in kept)
    assert p.nbytes == total == sum(t.untyped_storage().nbytes() for t in p.compact().tensors.values())
    assert p.bits_per_element == 8 * total / (2 * 3 * 150 * 32)


@LAWS
def test_nothing_outside_the_kept_tensors_is_needed_to_decode(spec: str, role: Role, tmp_path: Path) -> None:
    p = packed(spec, role)
    p.save(tmp_path / "a.safetensors")
    assert sum(t.nbytes for t in load_file(tmp_path / "a.safetensors").values()) == p.nbytes
    fresh = Packed.load(tmp_path / "a.safetensors", get(spec))
    assert torch.equal(fresh.decode(), p.decode())


@LAWS
def test_a_slice_decodes_to_the_slice(spec: str, role: Role) -> None:
    p = packed(spec, role)
    whole = p.decode()
    for start, stop in ((0, 150), (0, 1), (149, 150), (63, 65), (64, 128), (5, 97), (40, 40), (20, 10), (-3, 500), (300, 400)):
        part = p.slice(start, stop)
        expected = whole[:, :, max(0, start) : max(0, start, stop)]
        close(part.decode(), expected)
        assert part.tokens == expected.shape[2]
        assert part.nbytes <= p.nbytes
        again = part.slice(1, 30).slice(2, 20)
        close(again.decode(), expected[:, :, 1:30][:, :, 2:20])


@pytest.mark.parametrize("spec", SPECS)
def test_a_slice_shares_memory_and_a_compact_one_does_not(spec: str) -> None:
    p = packed(spec)
    part = p.slice(64, 128)
    assert all(t.untyped_storage().data_ptr() == p.tensors[n].untyped_storage().data_ptr() for n, t in part.tensors.items())
    own = part.compact()
    same(own, part)
    assert sum(t.untyped_storage().nbytes() for t in own.tensors.values()) == own.nbytes < p.nbytes


@LAWS
def test_parts_join_to_the_whole(spec: str, role: Role) -> None:
    p = packed(spec, role)
    parts = [p.slice(a, b) for a, b in ((0, 64), (64, 64), (64, 128), (128, 150))]
    same(Packed.cat(parts), p)
    same(Packed.cat([p]), p)
    tail = p.slice(70, 150)  # begins inside a group
    cut = (-70) % p.codec.group
    same(Packed.cat([tail.slice(0, cut), tail.slice(cut, 80)]), tail)


@pytest.mark.parametrize("spec", SPECS)
def test_an_empty_part_joins_and_is_saved_like_any_other(spec: str, tmp_path: Path) -> None:
    p = packed(spec)
    empty = p.slice(70, 70)
    assert empty.nbytes == empty.bits_per_element == 0
    same(Packed.cat([empty, p]), p)
    empty.save(tmp_path / "empty.safetensors")
    assert Packed.load(tmp_path / "empty.safetensors").decode().shape == (2, 3, 0, 32)


@pytest.mark.parametrize("spec", ["hqmq:4", "kivi:4"])
def test_parts_that_split_a_group_do_not_join(spec: str) -> None:
    p = packed(spec)
    with pytest.raises(ValueError, match=rf"{spec} encodes \d+ tokens together.*left part ends 10 tokens into a group"):
        Packed.cat([p.slice(0, 74 if spec == "hqmq:4" else 42), p.slice(128, 150)])
    with pytest.raises(ValueError, match="right one begins 1 tokens into one"):
        Packed.cat([p.slice(0, 64), p.slice(65, 150)])


@pytest.mark.parametrize(
    "other",
    [
        lambda: packed("int:3"),
        lambda: packed("int:4", "value"),
        lambda: packed("int:4", dim=64),
        lambda: get("int:4").encode(gaussian(2, 3, 9), "key", layer=3),
        lambda: get("int:4").encode(gaussian(1, 3, 9), "key", layer=2),
    ],
    ids=["codec", "role", "head_dim", "layer", "batch"],
)
def test_what_differs_does_not_join(other: Callable[[], Packed]) -> None:
    with pytest.raises(ValueError, match=r"cannot join .* in int:\d to keys of layer 2, shape \(2, 3, 150, 32\), in int:4"):
        Packed.cat([packed("int:4"), other()])


@LAWS
def test_rows_are_selected_in_the_order_given(spec: str, role: Role) -> None:
    p = packed(spec, role)
    rows = torch.tensor([1, 0, 0, 1, 1])
    chosen = p.select(rows)
    assert chosen.shape == (5, 3, 150, 32)
    close(chosen.decode(), p.decode()[rows])
    close(chosen.slice(70, 90).decode(), p.decode()[rows, :, 70:90])
    assert p.select(torch.tensor([], dtype=torch.long)).decode().shape == (0, 3, 150, 32)


@pytest.mark.parametrize("spec", SPECS)
def test_moving_moves_every_tensor_and_changes_none(spec: str) -> None:
    p = packed(spec)
    same(p.to("cpu"), p)
    away = p.to("meta")
    assert away.device.type == "meta"
    assert {t.device.type for t in away.tensors.values()} == {"meta"}
    assert (away.shape, away.nbytes) == (p.shape, p.nbytes)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", SPECS)
def test_decoding_on_a_gpu_gives_the_same(spec: str) -> None:
    p = packed(spec)
    torch.testing.assert_close(p.to("cuda").decode().cpu(), p.decode(), atol=1e-3, rtol=1e-3)


@LAWS
def test_a_file_gives_back_what_was_saved(spec: str, role: Role, tmp_path: Path) -> None:
    p = packed(spec, role)
    for name, part in (("whole", p), ("part", p.slice(70, 100))):
        part.save(tmp_path / f"{name}.safetensors")
        same(Packed.load(tmp_path / f"{name}.safetensors"), part)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part.safetensors", "whole.safetensors"]


def test_a_codec_without_a_name_loads_its_own_files(tmp_path: Path) -> None:
    book = torch.nn.functional.normalize(torch.randn(20, 4), dim=-1)
    codec = HQMQ(codebook=book, outliers=None)
    p = codec.encode(gaussian())
    p.save(tmp_path / "own.safetensors")
    same(Packed.load(tmp_path / "own.safetensors", HQMQ(codebook=book, outliers=None)), p)
    with pytest.raises(ValueError, match="unknown codec"):
        Packed.load(tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match=r"this was encoded by 'HQMQ\(20.*not by 'hqmq:4'"):
        Packed.load(tmp_path / "own.safetensors", get("hqmq:4"))


@pytest.mark.parametrize("name", ["codec", "shape", "dtype", "role", "layer", "offset"])
def test_a_header_without_a_word_is_refused(name: str) -> None:
    p = packed("kivi:4")
    header = p.metadata()
    del header[name]
    with pytest.raises(ValueError, match=f"no packed cache.*'{name}'"):
        Packed.from_parts(header, p.tensors)


@pytest.mark.parametrize(
    ("name", "word", "message"),
    [
        ("codec", "hqmk:4", "did you mean 'hqmq'"),
        ("shape", "2,3,150", r"no packed cache: .*shape \(2, 3, 150\)"),
        ("shape", "2,three,150,32", "'three'"),
        ("shape", "2,3,-150,32", "no packed cache.*-150"),
        ("shape", "2,3,149,32", "field '.*' of shape .*149"),
        ("dtype", "float31", "float31"),
        ("dtype", "nn", "dtype 'nn'"),
        ("dtype", "int32", "dtype 'int32'"),
        ("role", "query", "role 'query'"),
        ("layer", "one", "'one'"),
        ("layer", "-1", "layer -1"),
        ("offset", "77", "offset 77"),
    ],
)
def test_a_header_with_a_wrong_word_names_it(name: str, word: str, message: str) -> None:
    p = packed("kivi:4")
    with pytest.raises(ValueError, match=message):
        Packed.from_parts({**p.metadata(), name: word}, p.tensors)


@LAWS
def test_damaged_tensors_are_refused_by_name(spec: str, role: Role) -> None:
    p = packed(spec, role)
    header = p.metadata()
    for name, tensor in p.tensors.items():
        without = {k: t for k, t in p.tensors.items() if k != name}
        with pytest.raises(ValueError, match=f"field '{name}' .* is missing"):
            Packed.from_parts(header, without)
        shorter = tensor[:-1] if p.codec.fields[name] == "ragged" else tensor[:, :, :-1]
        for wrong in (shorter, tensor[..., :-1], torch.zeros_like(tensor, dtype=torch.float64)):
            with pytest.raises(ValueError, match=f"field '{name}' of shape"):
                Packed.from_parts(header, {**without, name: wrong})
    with pytest.raises(ValueError, match="field 'more' does not belong"):
        Packed.from_parts(header, {**p.tensors, "more": torch.zeros(3)})


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="this is no packed cache"):
        Packed.load(path)
    with pytest.raises(FileNotFoundError):
        Packed.load(tmp_path / "missing.safetensors")
