"""Each baseline codec agrees with an independent scalar implementation of its definition."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
from codec_fixtures import ROLES, gaussian, nmse
from torch import Tensor

from tessera.codecs import Role, get
from tessera.codecs.rotation import rotation
from tessera.codecs.scalar import normal_levels

f32, f16 = np.float32, np.float16


def half(value: float) -> float:
    """Round to half precision."""
    return float(f16(value))


def vectors(x: Tensor) -> list[np.ndarray]:
    """Split (..., d) into arrays of d float32."""
    return list(x.reshape(-1, x.shape[-1]).numpy())


def mixed(*shape: int) -> Tensor:
    """Draw Gaussian vectors of many sizes, and one of zeros."""
    x = torch.randn(*shape) * torch.logspace(-3, 3, shape[2])[:, None]
    x[0, 0, 1] = 0
    return x


def is_close(found: Tensor, wanted: list[list[float]], share: float = 1.0) -> None:
    """Whether at least this share of elements is equal within float32 rounding, since rounding can resolve ties."""
    expected = np.array(wanted).reshape(found.shape)
    unit = np.abs(expected).max(-1, keepdims=True)
    assert (np.abs(found.double().numpy() - expected) <= 1e-5 * unit + 1e-12).mean() >= share


# int:b


def int_oracle(x: np.ndarray, bits: int) -> list[float]:
    most = 2 ** (bits - 1) - 1
    scale = half(f32(np.abs(x).max()) / f32(most))
    if scale == 0:
        return [0.0] * len(x)
    return [max(-most, min(most, round(float(f32(v) / f32(scale))))) * scale for v in x]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_int_rounds_to_levels_of_the_largest_magnitude(bits: int, role: Role) -> None:
    x = mixed(2, 2, 30, 40)
    p = get(f"int:{bits}").encode(x, role)
    is_close(p.decode(), [int_oracle(v, bits) for v in vectors(x)])
    assert p.bits_per_element == bits + 16 / 40


# kivi:b


def kivi_oracle(group: np.ndarray, bits: int) -> list[float]:
    low = half(group.min())
    scale = half((f32(group.max()) - f32(low)) / f32(2**bits - 1))
    if scale == 0:
        return [low] * len(group)
    return [max(0, min(2**bits - 1, round(float((f32(v) - f32(low)) / f32(scale))))) * scale + low for v in group]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_kivi_groups_key_channels_over_32_tokens(bits: int) -> None:
    x = torch.randn(2, 2, 75, 24) * torch.logspace(-3, 3, 24) + torch.randn(24)
    y = get(f"kivi:{bits}").encode(x, "key").decode()
    expected = np.zeros(x.shape)
    for b, h, c in np.ndindex(2, 2, 24):
        for start in range(0, 75, 32):
            expected[b, h, start : start + 32, c] = kivi_oracle(x[b, h, start : start + 32, c].numpy(), bits)
    is_close(y.transpose(2, 3), expected.transpose(0, 1, 3, 2).tolist(), 0.999)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_kivi_groups_values_over_32_channels(bits: int) -> None:
    x = mixed(2, 2, 30, 80)
    y = get(f"kivi:{bits}").encode(x, "value").decode()
    expected = [[n for start in (0, 32, 64) for n in kivi_oracle(v[start : start + 32], bits)] for v in vectors(x)]
    is_close(y, expected, 0.999)


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi_bits(bits: int) -> None:
    x = gaussian(2, 2, 96, 64)
    for role in ROLES:
        assert get(f"kivi:{bits}").encode(x, role).bits_per_element == bits + 1
    # An incomplete group also has a minimum and a scale.
    keys = get(f"kivi:{bits}").encode(x[:, :, :33], "key")
    assert keys.nbytes == 2 * 2 * (33 * 64 * bits // 8 + 2 * 64 * 4)
    values = get(f"kivi:{bits}").encode(x[..., :40], "value")
    assert values.nbytes == 2 * 2 * 96 * (40 * bits // 8 + 2 * 4)


# q4_0 and q8_0, after ggml's reference, block by block


def q4_0_block(x: np.ndarray) -> bytes:
    biggest = f32(0)
    for v in x:
        if abs(v) > abs(biggest):
            biggest = v
    d = f32(biggest / f32(-8))
    inverse = f32(1) / d if half(d) else f32(0)
    q = [min(15, int(f32(v * inverse) + f32(8.5))) for v in x]
    return struct.pack("<e", half(d)) + bytes(q[i] | q[i + 16] << 4 for i in range(16))


def q4_0_read(block: bytes) -> list[float]:
    (d,) = struct.unpack("<e", block[:2])
    low, high = [byte & 15 for byte in block[2:]], [byte >> 4 for byte in block[2:]]
    return [d * (n - 8) for n in low + high]


def q8_0_block(x: np.ndarray) -> bytes:
    d = f32(np.abs(x).max() / f32(127))
    inverse = f32(1) / d if half(d) else f32(0)
    scaled = [float(f32(v * inverse)) for v in x]
    q = [int(math.copysign(math.floor(abs(s) + 0.5), s)) for s in scaled]
    return struct.pack("<e32b", half(d), *q)


def q8_0_read(block: bytes) -> list[float]:
    d, *q = struct.unpack("<e32b", block)
    return [d * n for n in q]


FORMATS = {"q4_0": (q4_0_block, q4_0_read, 18), "q8_0": (q8_0_block, q8_0_read, 34)}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", FORMATS)
def test_llama_cpp_blocks_byte_for_byte(name: str, role: Role) -> None:
    write, read, size = FORMATS[name]
    x = mixed(2, 2, 30, 64)
    p = get(f"{name}:norot").encode(x, role)
    kept = p.tensors["blocks"].numpy()
    assert kept.shape == (2, 2, 30, 2, size)
    blocks = [write(v[i : i + 32]) for v in vectors(x) for i in (0, 32)]
    same = [bytes(row) == block for row, block in zip(kept.reshape(-1, size), blocks, strict=True)]
    assert np.mean(same) > 0.98  # the last bit of a product may resolve a tie
    read_back = [[*read(bytes(row[0])), *read(bytes(row[1]))] for row in kept.reshape(-1, 2, size)]
    is_close(p.decode(), read_back)
    is_close(p.decode(), [[*read(write(v[:32])), *read(write(v[32:]))] for v in vectors(x)], 0.995)


@pytest.mark.parametrize(("name", "most"), [("q4_0", -8.0), ("q8_0", 127.0)])
def test_llama_cpp_breaks_ties_as_its_reference_does(name: str, most: float) -> None:
    # d is 1, so that halves are exact.
    write, _, _ = FORMATS[name]
    x = torch.arange(-7.5, 8.5, 0.5)
    x[0] = most
    kept = get(f"{name}:norot").encode(x.view(1, 1, 1, 32)).tensors["blocks"]
    assert bytes(kept.flatten().tolist()) == write(x.numpy())


@pytest.mark.parametrize("name", FORMATS)
def test_rotated_blocks_are_the_blocks_of_the_rotated_vectors(name: str) -> None:
    write, read, _ = FORMATS[name]
    x = mixed(2, 2, 30, 64)
    basis = rotation(64)
    rotated = torch.tensor([[*read(write(v[:32])), *read(write(v[32:]))] for v in vectors(x @ basis.T)])
    is_close(get(name).encode(x).decode(), (rotated @ basis).double().tolist(), 0.99)


@pytest.mark.parametrize(("name", "bits"), [("q4_0", 4.5), ("q8_0", 8.5)])
def test_llama_cpp_bits(name: str, bits: float) -> None:
    for spec in (name, f"{name}:norot"):
        assert get(spec).encode(gaussian(2, 2, 7, 128)).bits_per_element == bits
        # 80 channels take three blocks.
        assert get(spec).encode(gaussian(2, 2, 7, 80)).bits_per_element == bits * 96 / 80


@pytest.mark.parametrize("name", FORMATS)
def test_rotation_helps_where_a_few_numbers_are_large(name: str) -> None:
    x = torch.distributions.StudentT(torch.tensor(3.0)).sample((2, 2, 300, 64))
    rotated, plain = (nmse(x, get(spec).encode(x).decode()) for spec in (name, f"{name}:norot"))
    assert rotated < 0.8 * plain


# scalar:b


def test_scalar_levels_are_those_of_max() -> None:
    # J. Max, Quantizing for Minimum Distortion, 1960, table I: output levels for 4, 8 and 16 steps, and the error.
    tables = {
        2: (0.1175, [0.4528, 1.510]),
        3: (0.03454, [0.2451, 0.7560, 1.344, 2.152]),
        4: (0.009497, [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733]),
    }
    x = torch.linspace(-9, 9, 100_001, dtype=torch.float64)
    density = torch.exp(-x * x / 2)
    for bits, (error, positive) in tables.items():
        levels = normal_levels(bits)
        assert levels.tolist() == pytest.approx([*(-v for v in reversed(positive)), *positive], abs=2e-3)
        nearest = (x[:, None] - levels).abs().amin(1)
        assert float((density * nearest**2).sum() / density.sum()) == pytest.approx(error, rel=1e-3)


def scalar_oracle(x: np.ndarray, bits: int) -> np.ndarray:
    levels = normal_levels(bits).double().numpy()
    rotated = rotation(len(x)).double().numpy() @ x
    norm = np.linalg.norm(rotated)
    if norm == 0:
        return 0 * rotated
    chosen = levels[np.abs(rotated[:, None] / norm * len(x) ** 0.5 - levels).argmin(1)]
    scale = half(norm / np.linalg.norm(chosen))
    return scale * chosen @ rotation(len(x)).double().numpy()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_scalar_rounds_rotated_coordinates_and_keeps_the_norm(bits: int, role: Role) -> None:
    x = mixed(2, 2, 30, 48)
    p = get(f"scalar:{bits}").encode(x, role)
    is_close(p.decode(), [scalar_oracle(v, bits).tolist() for v in vectors(x.double())], 0.98)
    assert torch.allclose(p.decode().norm(dim=-1), x.norm(dim=-1), rtol=1e-3, atol=1e-6)
    assert p.bits_per_element == bits + 16 / 48


def test_keeping_the_norm_costs_little_error() -> None:
    x = gaussian(2, 2, 1000, 64)
    for bits, cost in ((2, 0.03), (4, 0.0025)):
        y = get(f"scalar:{bits}").encode(x).decode()
        best = (x * y).sum(-1, keepdim=True) / y.square().sum(-1, keepdim=True)
        assert nmse(x, y) / nmse(x, best * y) == pytest.approx(1 + cost, abs=0.15 * cost)


# fp8


def e4m3() -> np.ndarray:
    """Return every finite number of the format: a sign, four exponent bits with bias 7, three mantissa bits; all ones are
    NaN."""
    numbers = {0.0}
    for exponent in range(16):
        for mantissa in range(8):
            if (exponent, mantissa) != (15, 7):
                value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
                numbers |= {value, -value}
    return np.array(sorted(numbers))


@pytest.mark.parametrize("role", ROLES)
def test_fp8_is_the_nearest_number_of_the_format(role: Role) -> None:
    x = mixed(2, 2, 30, 40)
    p = get("fp8").encode(x, role)
    y = p.decode()
    numbers = e4m3()
    assert numbers.max() == 448
    assert np.isin(y.numpy(), numbers).all()
    nearest = np.abs(x.double().numpy()[..., None] - numbers).min(-1)
    np.testing.assert_allclose((x - y).abs().double().numpy(), nearest, rtol=1e-5, atol=1e-9)
    assert p.bits_per_element == 8
    assert (y.abs() == 448).any()  # the largest have saturated


@pytest.mark.parametrize("role", ROLES)
def test_scaled_fp8_gives_each_vector_the_whole_range(role: Role) -> None:
    x = mixed(2, 2, 30, 40)
    p = get("fp8:scaled").encode(x, role)
    numbers = e4m3()
    expected = []
    for v in vectors(x):
        most = half(np.abs(v).max())
        unit = v.astype(float) * (448 / most) if most else 0 * v
        expected.append([float(numbers[np.abs(u - numbers).argmin()]) * most / 448 for u in unit])
    is_close(p.decode(), expected, 0.99)
    assert p.bits_per_element == 8 + 16 / 40
