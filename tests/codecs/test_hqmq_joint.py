"""``hqmq:b``, whose secondaries include the radius, finds the nearest codewords and stays within its error bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from codec_fixtures import ROLES, gaussian, nmse
from quaternion_oracle import hurwitz_units, product

from tessera.codecs import HQMQ, JointHQMQ, Packed, get, make_codebooks
from tessera.codecs.codebooks import DIRECTION_SIZES, JOINT_BITS, joint, joint_path, optimised_secondary

#: Bits per number whose codebooks are indexed in under a second.
FAST = (2, 2.5, 3, 3.5, 4)


def all_codewords(code_bits: int) -> np.ndarray:
    """Return every distinct q_p·q_s of a shipped codebook, computed from its file, (n, 4) float64."""
    book = joint(code_bits)
    base = book.base.numpy().astype(np.float64)
    if book.conjugations:
        u = hurwitz_units()[:, None]
        base = product(product(u, base[None]), u * [1, -1, -1, -1]).reshape(-1, 4)
    words = product(hurwitz_units()[:, None], base[None]).reshape(-1, 4)
    return np.unique(words.round().astype(int), axis=0) * book.step


def byte_scale(rms: np.ndarray) -> np.ndarray:
    """Return the nearest scale that a byte can store, eight per octave."""
    return 2.0 ** (np.round(np.log2(rms) * 8) / 8)


@pytest.mark.parametrize("bits", FAST)
def test_every_chunk_gets_the_nearest_codeword(bits: float) -> None:
    codec = JointHQMQ(bits, rotate=False, centre=False)
    x = torch.cat((gaussian(1, 2, 10, 32), gaussian(1, 2, 10, 32).sign() + 0.01 * gaussian(1, 2, 10, 32)), 2)
    x *= torch.logspace(-2, 2, 20)[:, None]
    y = codec.encode(x, "key").decode()
    scale = byte_scale(x.double().square().mean(-1, keepdim=True).sqrt().numpy())
    words = all_codewords(codec.code_bits)
    assert len(words) > 0.7 * 2**codec.code_bits
    chunks, decoded = (v.double().numpy().reshape(-1, 32) / scale.reshape(-1, 1) for v in (x, y))
    chunks, decoded = chunks.reshape(-1, 4), decoded.reshape(-1, 4)
    # The result is a codeword ...
    assert max(np.abs(words - row).max(1).min() for row in decoded[::7]) < 1e-5
    # ... and none is nearer.
    found = np.linalg.norm(chunks - decoded, axis=1)
    best = np.array([np.linalg.norm(words - row, axis=1).min() for row in chunks])
    np.testing.assert_allclose(found, best, atol=2e-5)


@pytest.mark.parametrize("rotate", [True, False])
def test_rotation_and_centring_are_undone(rotate: bool) -> None:
    x = gaussian(2, 2, 130, 64)
    for centre in (True, False):
        codec = JointHQMQ(3, rotate=rotate, centre=centre)
        for role in ROLES:
            p = codec.encode(x, role)
            assert nmse(x, p.decode()) < 0.03
            assert ("centre" in p.tensors) == (centre and role == "key")


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_values_are_not_shortened_on_average(bits: float) -> None:
    x = gaussian(1, 4, 512, 64)
    share = {role: (x * JointHQMQ(bits, centre=False).encode(x, role).decode()).sum() / x.square().sum() for role in ROLES}
    assert share["value"] == pytest.approx(1, abs=0.004)
    assert share["key"] == pytest.approx(1 - joint(int(4 * bits)).nmse, abs=0.004)


def test_each_part_lowers_the_error_where_it_should() -> None:
    heavy = torch.distributions.StudentT(torch.tensor(3.0)).sample((1, 4, 512, 64))
    assert nmse(heavy, get("hqmq:4").encode(heavy).decode()) < 0.9 * nmse(heavy, get("hqmq:4_norot").encode(heavy).decode())
    biased = torch.randn(1, 4, 512, 64) + 3 * torch.randn(1, 4, 1, 64)
    with_means, without = (nmse(biased, get(s).encode(biased, "key").decode()) for s in ("hqmq:4", "hqmq:4_nocentre"))
    assert with_means < 0.3 * without


# Bits and error


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bits", FAST)
def test_true_bits_are_the_documented_ones(bits: float, dim: int) -> None:
    codec = get(f"hqmq:{bits:g}")
    x = gaussian(2, 2, 128, dim)
    assert codec.encode(x).bits_per_element == bits + 8 / dim
    assert codec.encode(x, "key").bits_per_element == bits + 8 / dim + 1 / 4
    assert get(f"hqmq:{bits:g}_nocentre").encode(x, "key").bits_per_element == bits + 8 / dim
    # An incomplete group has whole means.
    assert codec.encode(x[:, :, :65], "key").nbytes - codec.encode(x[:, :, :65]).nbytes == 2 * 2 * 2 * dim * 2


@pytest.mark.parametrize(("spec", "error", "bits"), [("hqmq:4", 0.0075, 4.13), ("hqmq:3", 0.0290, 3.13)])
def test_error_on_gaussian_vectors_is_below_the_bar(spec: str, error: float, bits: float) -> None:
    x = gaussian(2, 4, 1024, 128)
    p = get(spec).encode(x)
    assert p.bits_per_element <= bits
    assert nmse(x, p.decode()) <= error


@pytest.mark.parametrize("dim", [64, 128])
def test_no_baseline_of_as_many_bits_errs_less(dim: int) -> None:
    x = gaussian(2, 2, 512, dim)
    ours = [get(f"hqmq:{b:g}").encode(x) for b in FAST]
    points = [(p.bits_per_element, nmse(x, p.decode())) for p in ours]
    paper = ("hqmq:s24_r2", "hqmq:s24_r3", "hqmq:s96_r3", "hqmq:s96_r4", "hqmq:s192_r4", "hqmq:o170_r4")
    for spec in (*paper, "int:3", "int:4", "scalar:3", "scalar:4", "q4_0", "kivi:3"):
        p = get(spec).encode(x)
        assert min(e for bits, e in points if bits <= p.bits_per_element) < nmse(x, p.decode()), spec


# Codebooks


@pytest.mark.parametrize("bits", JOINT_BITS)
def test_codebooks_fill_their_bits(bits: int) -> None:
    words = joint(bits).codewords
    assert 0.9 * 2**bits < len(words) <= 2**bits
    # A few codewords of large codebooks coincide, because some rotations leave base quaternions unchanged.
    assert len(torch.unique(words, dim=0)) > 0.7 * len(words)


@pytest.mark.parametrize("bits", [b for b in JOINT_BITS if b <= 16])
def test_codebooks_fit_chunks_of_unit_mean_square(bits: int) -> None:
    # A codeword that minimises the error is the mean of what is coded by it, so the codewords' mean square is that of
    # the chunks less the error; a step of the wrong size would break this.
    x = torch.from_numpy(make_codebooks.gaussian_chunks(np.random.default_rng(0), 48_000)).float().view(1, 1, -1, 96)
    y = JointHQMQ(bits / 4, rotate=False, centre=False).encode(x, "key").decode()
    error = nmse(x, y)
    assert float(y.square().mean() / x.square().mean()) == pytest.approx(1 - error, abs=0.15 * error + 1e-3)


def test_the_shipped_joint_codebook_is_what_the_script_makes() -> None:
    secondary, step = make_codebooks.make_joint(8)
    with np.load(joint_path(8)) as file:
        assert sorted(file.files) == ["nmse", "secondary", "step"]
        assert make_codebooks.measure(8, file["secondary"], float(file["step"])) == pytest.approx(float(file["nmse"]), rel=1e-4)
        assert file["secondary"].dtype == np.int16
        # Rounding may differ by one unit, a fiftieth of a typical number.
        assert np.abs(secondary - file["secondary"]).max() <= 1
        assert step == pytest.approx(float(file["step"]), rel=1e-3)


def test_the_shipped_directions_are_what_the_script_makes() -> None:
    made = torch.from_numpy(make_codebooks.make_directions(5)).float()
    torch.testing.assert_close(made, optimised_secondary(5), atol=1e-3, rtol=0)


@pytest.mark.parametrize("size", [size for size in DIRECTION_SIZES if size <= 48])
def test_the_shipped_directions_hardly_move_in_another_step(size: int) -> None:
    rng = np.random.default_rng(9)
    book = optimised_secondary(size).double().numpy()
    group = make_codebooks.symmetries(False)
    moved = make_codebooks.lloyd(book, group, [make_codebooks.directions(rng, 40_000)], unit=True)
    drawn = make_codebooks.directions(rng, size)
    away = make_codebooks.lloyd(drawn, group, [make_codebooks.directions(rng, 40_000)], unit=True)
    assert np.linalg.norm(moved - book, axis=1).mean() < 0.15 * np.linalg.norm(away - drawn, axis=1).mean()


def test_nearest_integers_of_even_sum() -> None:
    x = 5 * torch.randn(400, 4, dtype=torch.float64).numpy()
    near = make_codebooks.round_to_d4(x)
    assert (near.sum(1) % 2 == 0).all()
    grid = np.array(np.meshgrid(*[range(-2, 3)] * 4)).reshape(4, -1).T
    for row, found in zip(x, near, strict=True):
        around = grid + np.rint(row)
        around = around[around.sum(1) % 2 == 0]
        assert np.linalg.norm(row - found) == pytest.approx(np.linalg.norm(around - row, axis=1).min())


def test_symmetries_are_the_products_from_both_sides() -> None:
    x = torch.randn(4, dtype=torch.float64).numpy()
    u = hurwitz_units()
    left = make_codebooks.symmetries(False) @ x
    np.testing.assert_allclose(left, product(u, x), atol=1e-12)
    both = make_codebooks.symmetries(True)
    assert both.shape == (288, 4, 4)
    every = product(product(u[:, None], x), u[None]).reshape(-1, 4)
    assert len(np.unique(every.round(9), axis=0)) == 288
    for row in both @ x:
        assert np.abs(every - row).max(1).min() < 1e-9


@pytest.mark.parametrize(
    ("spec", "revision", "data", "words", "step"),
    [
        ("hqmq:3_norot_nocentre", "1", [0xD2, 0x04, 0xFA], [[-40, 40, 7, 27], [87, -9, -87, 7]], 0.02799804),
        ("hqmq:4_norot_nocentre", "2", [0xD2, 0x04, 0xA0, 0x0F], [[32, 0, -6, -4], [-3, 12, 29, -36]], 0.03316313),
    ],
)
def test_codes_mean_what_they_meant_in_files_written_earlier(
    spec: str, revision: str, data: list[int], words: list[list[int]], step: float
) -> None:
    # Codes 1234 and 4000, and a scale of two octaves above one.
    header = {"codec": spec, "shape": "1,1,1,8", "dtype": "float32", "role": "key", "layer": "0", "offset": "0"}
    header["revision"] = revision
    tensors = {"codes": torch.tensor([[[data]]]).to(torch.uint8), "scale": torch.tensor([[[144]]]).to(torch.uint8)}
    decoded = Packed.from_parts(header, tensors).decode()
    torch.testing.assert_close(decoded.view(2, 4), 4 * step * torch.tensor(words), rtol=1e-5, atol=0)


def test_codes_of_another_revision_are_refused() -> None:
    packed = JointHQMQ(4).encode(torch.randn(1, 1, 64, 8))
    for header in ({**packed.metadata(), "revision": "1"}, {k: v for k, v in packed.metadata().items() if k != "revision"}):
        with pytest.raises(ValueError, match="revision 1 of 'hqmq:4'; this version reads revision 2"):
            Packed.from_parts(header, packed.tensors)


def test_bits_without_a_codebook_are_refused() -> None:
    with pytest.raises(ValueError, match=r"hqmq takes 2, 2.5, 3, 3.5, 4, 4.5, 5 bits, got 3.25"):
        JointHQMQ(3.25)
    with pytest.raises(ValueError, match="no joint codebook of 9 bits; there are 8, 10, 12, 14, 16, 18, 20"):
        joint(9)
    with pytest.raises(ValueError, match="no optimised codebook of 7 secondaries; there are 5, 10"):
        HQMQ(7, codebook="optimised")
