"""With different codecs for keys and values, each works as it does alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from codec_fixtures import ROLES, gaussian

from tessera.codecs import Packed, Pair, Role, get

SPECS = ("hqmq:k4v3", "(k=q8_0,v=hqmq:3)", "(k=hqmq:2,v=kivi:4)", "(k=kivi:2,v=hqmq:s24_r2_med3)")


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("spec", SPECS)
def test_what_is_packed_is_of_the_codec_of_its_role(spec: str, role: Role, tmp_path: Path) -> None:
    codec = get(spec)
    assert isinstance(codec, Pair)
    side, other = (codec.key, codec.value) if role == "key" else (codec.value, codec.key)
    assert codec.side(role) is side
    x = gaussian(2, 3, 70, 32)
    packed, alone = codec.encode(x, role, layer=1), get(side.spec).encode(x, role, layer=1)
    assert packed.codec is side
    assert packed.tensors.keys() == alone.tensors.keys()
    assert all(torch.equal(tensor, alone.tensors[name]) for name, tensor in packed.tensors.items())
    assert torch.equal(codec.decode(packed), alone.decode())
    packed.save(tmp_path / "packed")
    alone.save(tmp_path / "alone")
    for name in ("packed", "alone"):
        for reader in (None, codec, side):
            found = Packed.load(tmp_path / name, reader)
            assert found.codec == side
            assert torch.equal(found.decode(), alone.decode())
        with pytest.raises(ValueError, match="this was encoded by"):
            Packed.load(tmp_path / name, other)


@pytest.mark.parametrize(("spec", "group"), [("(k=q8_0,v=int:4)", 1), ("(k=kivi:4,v=int:4)", 32), ("(k=kivi:4,v=hqmq:3)", 64)])
def test_groups_of_both_end_together(spec: str, group: int) -> None:
    assert get(spec).group == group


def test_a_pair_is_named_by_what_it_is_made_of() -> None:
    assert Pair(get("hqmq:4.5"), get("hqmq:3.5")) == get("hqmq:k4.5v3.5") == get("(k=hqmq:4.5,v=hqmq:3.5)")
    assert Pair(get("hqmq:4_nocentre"), get("hqmq:3_nocentre")).spec == "hqmq:k4v3_nocentre"
    assert Pair(get("hqmq:4_nocentre"), get("hqmq:3")).spec == "(k=hqmq:4_nocentre,v=hqmq:3)"
    assert get(" ( k = q8_0 , v = hqmq:3 ) ").spec == get("(v=hqmq:3,k=q8_0)").spec == "(k=q8_0,v=hqmq:3)"
    assert len({get("hqmq:k4v3"), get("hqmq:k3v4"), get("(k=q8_0,v=hqmq:3)"), get("(k=hqmq:3,v=q8_0)")}) == 4


def test_a_pair_of_the_same_is_the_codec_itself() -> None:
    assert get("hqmq:k4v4") == get("(k=hqmq:4,v=hqmq:4.0)") == get("hqmq:4")
    with pytest.raises(ValueError, match="keys and values have the same codec: write 'q4_0'"):
        Pair(get("q4_0"), get("q4_0"))


@pytest.mark.parametrize("spec", ["(k=hqmq:k4v3,v=q8_0)", "(k=hqmq:k4v3,v=hqmq:k4v3)"])
def test_a_pair_of_pairs_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=r"hqmq:k4v3 is two codecs; keys need one, as in '\(k=q8_0,v=hqmq:3\)'"):
        get(spec)
