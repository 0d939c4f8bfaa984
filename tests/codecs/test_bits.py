"""Fixed-width integers are packed into bytes and unpacked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.kernels.bits import pack_bits, packed_bytes, unpack_bits

WIDTHS = range(1, 25)


@st.composite
def numbers(draw: st.DrawFn) -> tuple[int, list[int]]:
    """Draw a width, and integers of that width."""
    bits = draw(st.integers(1, 24))
    return bits, draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))


def by_strings(codes: list[int], bits: int) -> list[int]:
    """Pack by the definition: write the numbers as strings of bits, lowest bit first, and split the string into bytes."""
    text = "".join(f"{code:0{bits}b}"[::-1] for code in codes)
    return [int(text[i : i + 8][::-1], 2) for i in range(0, len(text), 8)]


@given(numbers())
@settings(deadline=None, max_examples=200)
def test_packing_is_the_concatenation_of_the_bits(drawn: tuple[int, list[int]]) -> None:
    bits, codes = drawn
    packed = pack_bits(torch.tensor(codes, dtype=torch.long), bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == by_strings(codes, bits)
    assert unpack_bits(packed, bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("bits", WIDTHS)
def test_round_trip_along_the_last_axis(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 2, 5, 13))
    codes[0, 0, 0], codes[0, 0, 1] = 0, 2**bits - 1
    packed = pack_bits(codes, bits)
    assert packed.shape == (3, 2, 5, packed_bytes(13, bits))
    assert torch.equal(unpack_bits(packed, bits, 13), codes)
    assert torch.equal(packed[1, 1, 3], pack_bits(codes[1, 1, 3], bits))  # rows do not share bytes


@pytest.mark.parametrize("bits", WIDTHS)
def test_nothing_but_the_bits_is_kept(bits: int) -> None:
    for count in (1, 2, 7, 8, 9, 31, 33):
        packed = pack_bits(torch.full((count,), 2**bits - 1), bits)
        assert packed.numel() == packed_bytes(count, bits) == -(-count * bits // 8)
        ones = np.unpackbits(packed.numpy(), bitorder="little")
        assert ones[: count * bits].all()
        assert not ones[count * bits :].any()  # the padding of the last byte is zero


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_first_numbers_can_be_read_alone(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (2, 11))
    assert torch.equal(unpack_bits(pack_bits(codes, bits), bits, 4), codes[:, :4])


@pytest.mark.parametrize("bits", WIDTHS)
def test_reading_gives_no_number_wider_than_its_bits(bits: int) -> None:
    noise = torch.randint(0, 256, (50, packed_bytes(16, bits)), dtype=torch.uint8)
    numbers = unpack_bits(noise, bits, 16)
    assert numbers.min() >= 0
    assert numbers.max() < 2**bits
    assert torch.equal(pack_bits(numbers, bits), noise)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype_packs_to_the_same_bytes(dtype: torch.dtype) -> None:
    codes = torch.randint(0, 32, (4, 9))
    assert torch.equal(pack_bits(codes.to(dtype), 5), pack_bits(codes, 5))


@pytest.mark.parametrize("bits", [1, 5, 8, 16, 18])
def test_no_numbers_need_no_bytes(bits: int) -> None:
    packed = pack_bits(torch.zeros(2, 0, dtype=torch.long), bits)
    assert packed.shape == (2, 0)
    assert unpack_bits(packed, bits, 0).shape == (2, 0)
