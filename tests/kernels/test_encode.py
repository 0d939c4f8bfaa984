"""Packing of codes in C++ agrees with the definitions in PyTorch."""

import pytest
import torch
from torch import Tensor

from tessera import codecs
from tessera.codecs.base import Role
from tessera.codecs.codebooks import joint
from tessera.codecs.hqmq_joint import words_of
from tessera.kernels import cpu, dispatch, pack
from tessera.kernels.bits import pack_bits, unpack_bits
from tessera.kernels.cpu import encode as cpu_encode

pytestmark = pytest.mark.skipif(cpu.MISSING is not None, reason=str(cpu.MISSING))

SHAPES = [(1, 2, 65, 128), (2, 3, 33, 80), (1, 1, 1, 5), (1, 2, 7, 1), (1, 1, 0, 64), (1, 2, 64, 33)]


@pytest.fixture(params=cpu.levels())
def level(request: pytest.FixtureRequest) -> str:
    return request.param


def vectors(shape: tuple[int, ...]) -> Tensor:
    """Draw vectors of many lengths, including zero, with outliers, with equal numbers, and with ties of rounding."""
    x = torch.randn(shape) * torch.randn(shape).exp()
    if shape[2] > 6:
        x[:, :, 1] = 0
        x[:, :, 2] *= 1e-9
        x[:, :, 3] *= 1e6
        x[:, :, 4] = (x[:, :, 4] * 2).round() / 2
        x[:, :, 5] = x[:, :, 5].sign() * 3
        x[..., 6, :1] = 1e4
    return x


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "spec",
    [
        *(f"scalar:{b}" for b in range(2, 7)),
        *(f"{name}:{b}" for name in ("int", "kivi") for b in range(2, 9)),
        "q4_0",
        "q4_0:norot",
        "q8_0",
    ],
)
def test_baselines_are_packed_bit_for_bit_as_defined(
    monkeypatch: pytest.MonkeyPatch, spec: str, shape: tuple[int, ...]
) -> None:
    codec, x = codecs.get(spec), vectors(shape)
    roles: tuple[Role, ...] = ("key", "value")
    for role in roles:
        monkeypatch.setenv("TESSERA_BACKEND", "cpu")
        got = codec.encode(x, role).tensors
        monkeypatch.setenv("TESSERA_BACKEND", "reference")
        wanted = codec.encode(x, role).tensors
        assert got.keys() == wanted.keys()
        for name, field in wanted.items():
            assert torch.equal(got[name], field), name


def test_baselines_on_a_cpu_are_packed_in_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pack_linear", "pack_levels", "pack_blocks"):
        monkeypatch.setattr(pack, name, lambda *_: pytest.fail("the definition ran"))
    for spec in ("scalar:4", "int:4", "kivi:4", "q4_0"):
        codecs.get(spec).encode(torch.randn(1, 2, 40, 64), "key")


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16, 18])
@pytest.mark.parametrize("shape", [(1, 2, 65, 128), (3, 1, 20, 18), (1, 1, 3, 1)], ids=str)
def test_codes_of_vectors_are_divided_found_and_packed(level: str, bits: int, shape: tuple[int, ...]) -> None:
    x, scale = torch.randn(shape) * 3, torch.rand(shape[:-1]) + 2
    scale.view(-1)[:1] = 0
    got = dispatch.pack_nearest(x, scale, words_of(bits), bits, backend=f"cpu:{level}")
    chunks = torch.nn.functional.pad(x / scale.unsqueeze(-1).clamp(min=1e-30), (0, -shape[-1] % 4)).unflatten(-1, (-1, 4))
    codes = dispatch.nearest(chunks.reshape(-1, 4), words_of(bits), backend=f"cpu:{level}").view(chunks.shape[:-1])
    codes[scale == 0] = 0
    assert torch.equal(got, pack_bits(codes, bits))
    if shape[-1] > 1:  # for a single number two codewords are always equally near
        packed = dispatch.pack_nearest(x, scale, words_of(bits), bits, backend="reference")
        assert (unpack_bits(packed, bits, codes.shape[-1]) != codes).float().mean() < 1e-2


@pytest.mark.parametrize("bits", [8, 10, 12, 16, 18])
def test_words_are_what_the_codes_stand_for(level: str, bits: int) -> None:
    x = torch.randn(3001, 4)
    x[:300] *= torch.logspace(-5, 3, 300)[:, None]
    codes, words = cpu_encode.nearest_words(x, words_of(bits), level)
    book = joint(bits)
    assert torch.equal(words, book.codewords.float()[codes.long()] * book.step)
    assert torch.equal(codes, cpu_encode.nearest(x, words_of(bits), level))


def feedback_inputs(heads: int, vectors: int, dim: int) -> tuple[Tensor, Tensor]:
    y = torch.randn(heads, vectors, dim)
    chunk = torch.arange(dim) // 4
    feedback = torch.randn(heads, dim, dim) * 0.2 / dim**0.5 * (chunk[:, None] < chunk)
    return y, feedback


@pytest.mark.parametrize(
    ("bits", "heads", "vectors", "dim"), [(8, 1, 70, 16), (12, 2, 65, 32), (16, 3, 130, 128), (16, 1, 1, 4), (18, 1, 5, 12)]
)
def test_every_chunk_is_coded_nearest_to_what_the_errors_ask_for(
    level: str, bits: int, heads: int, vectors: int, dim: int
) -> None:
    y, feedback = feedback_inputs(heads, vectors, dim)
    codes = dispatch.encode_feedback(y, feedback, words_of(bits), backend=f"cpu:{level}").long()
    assert codes.shape == (heads, vectors, dim // 4)
    # A code that differs by rounding changes all later ones, so the test checks the targets that follow from these codes.
    book = joint(bits)
    words = book.codewords.double() * book.step
    error = words[codes].flatten(2) - y.double()
    target = (y.double() - error @ feedback.double().transpose(1, 2)).view(-1, 4)
    least = torch.stack(
        [(words - t).square().sum(-1).amin().sqrt() for t in target[:: max(1, len(target) * len(words) // 2**25)]]
    )
    some = (words[codes.view(-1)] - target).norm(dim=-1)[:: max(1, len(target) * len(words) // 2**25)]
    assert (some - least).max() < 1e-5


@pytest.mark.parametrize("bits", [8, 16])
def test_feedback_gives_the_codes_of_the_definition(level: str, bits: int) -> None:
    y, feedback = feedback_inputs(2, 67, 32)
    # The diagonal blocks and those below are not read.
    chunk = torch.arange(32) // 4
    feedback[:, chunk[:, None] >= chunk] = torch.nan
    got = dispatch.encode_feedback(y, feedback, words_of(bits), backend=f"cpu:{level}")
    wanted = dispatch.encode_feedback(y, feedback, words_of(bits), backend="reference")
    assert (got == wanted).all(-1).float().mean() > 0.98
    without = dispatch.encode_feedback(y, torch.zeros_like(feedback), words_of(bits), backend=f"cpu:{level}")
    assert torch.equal(without.flatten(), dispatch.nearest(y.view(-1, 4), words_of(bits), backend=f"cpu:{level}"))


def test_feedback_of_nothing_and_of_shapes_that_do_not_fit() -> None:
    assert dispatch.encode_feedback(torch.zeros(2, 0, 8), torch.zeros(2, 8, 8), words_of(8)).shape == (2, 0, 2)
    with pytest.raises(ValueError, match="multiple of four"):
        dispatch.encode_feedback(torch.zeros(2, 3, 6), torch.zeros(2, 6, 6), words_of(8))
    with pytest.raises(ValueError, match="square matrix for each head"):
        dispatch.encode_feedback(torch.zeros(2, 3, 8), torch.zeros(1, 8, 8), words_of(8))
    with pytest.raises(ValueError, match="backend 'cpu' cannot run: the kernel takes float32"):
        dispatch.encode_feedback(torch.zeros(2, 3, 8).double(), torch.zeros(2, 8, 8), words_of(8), backend="cpu")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dim", [1, 7, 8, 33, 128])
def test_codes_are_packed_as_bits_are(bits: int, dim: int) -> None:
    codes = torch.randint(2**bits, (3, 5, dim))
    packed = dispatch.pack_linear(codes.float(), None, torch.ones(3, 5, 1), (0, 2**bits - 1), bits, group=1, span=max(2, dim))
    assert packed is not None
    assert torch.equal(packed, pack_bits(codes, bits))
    assert torch.equal(unpack_bits(packed, bits, dim), codes)


def encoded(
    monkeypatch: pytest.MonkeyPatch, backend: str, spec: str, x: Tensor, role: Role, weights: Tensor | None
) -> codecs.Packed:
    monkeypatch.setenv("TESSERA_BACKEND", backend)
    return codecs.get(spec).encode(x, role, weights=weights)


def channels(shape: tuple[int, int, int, int]) -> Tensor:
    """Draw vectors whose channels differ in mean and width, as those of keys do, and some zero and constant vectors."""
    x = torch.randn(shape) * torch.randn(shape[3]).exp() + 3 * torch.randn(shape[3])
    x[..., 1] *= 300
    x[:, :, 2:3] = 0
    x[:, :, 4:5] = 1e-6
    x[..., 3] = 7
    return x


@pytest.mark.parametrize("spec", ["hqmq:2", "hqmq:3", "hqmq:4", "hqmq:4.5", "hqmq:5", "hqmq:3_norot", "hqmq:4_nocentre"])
@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (2, 1, 130, 128), (1, 2, 65, 80), (2, 2, 129, 12), (1, 1, 1, 4)], ids=str)
def test_joint_codes_made_in_one_pass_are_those_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, level: str, spec: str, shape: tuple[int, int, int, int]
) -> None:
    x, codec = channels(shape), codecs.get(spec)
    weights = torch.exp2(-1.5 * torch.randint(0, 8, (*shape[:2], shape[3])).float())
    roles: tuple[tuple[Role, Tensor | None], ...] = (("key", weights), ("key", None), ("value", None))
    for role, weighed in roles:
        got, wanted = (encoded(monkeypatch, backend, spec, x, role, weighed) for backend in (f"cpu:{level}", "reference"))
        assert {name: (t.shape, t.dtype) for name, t in got.tensors.items()} == {
            name: (t.shape, t.dtype) for name, t in wanted.tensors.items()
        }
        # Sums in another order may round differently, which changes the codes of a few vectors.
        assert (got.tensors["scale"] != wanted.tensors["scale"]).float().mean() < 0.01
        if "centre" in wanted.tensors:
            assert (got.tensors["centre"] != wanted.tensors["centre"]).float().mean() < 0.01
        assert (got.tensors["codes"] != wanted.tensors["codes"]).any(-1).float().mean() < 0.05
        scale = weighed.unsqueeze(2).sqrt() if weighed is not None and codec.weighs else 1.0
        found, least = ((scale * (codec.decode(one) - x)).square().mean(-1) for one in (got, wanted))
        torch.testing.assert_close(found.mean(), least.mean(), rtol=0.01, atol=1e-9)


def test_joint_codes_on_a_cpu_are_made_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pack_nearest", "encode_feedback"):
        monkeypatch.setattr(dispatch, name, lambda *_: pytest.fail("the steps ran"))
    weights = torch.ones(1, 2, 64)
    for role, weighed in (("key", weights), ("key", None), ("value", None)):
        codecs.get("hqmq:4").encode(torch.randn(1, 2, 40, 64), role, weights=weighed)  # type: ignore[arg-type]


def test_joint_codes_of_a_vector_do_not_depend_on_the_others_of_the_call(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_BACKEND", f"cpu:{level}")
    x, codec = channels((2, 3, 320, 64)), codecs.get("hqmq:4")
    weights = torch.rand(2, 3, 64) + 0.01
    whole = codec.encode(x, "key", weights=weights).tensors
    for row, head, group in ((0, 0, 0), (1, 2, 4), (0, 1, 2)):
        part = x[row : row + 1, head : head + 1, 64 * group : 64 * group + 64]
        alone = codec.encode(part, "key", weights=weights[row : row + 1, head : head + 1]).tensors
        for name, field in alone.items():
            some = slice(group, group + 1) if name == "centre" else slice(64 * group, 64 * group + 64)
            assert torch.equal(field, whole[name][row : row + 1, head : head + 1, some]), name


def test_weights_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weights \(1, 2, 64\) do not fit vectors \(3, 2, 64, 64\)"):
        codecs.get("hqmq:4").encode(torch.randn(3, 2, 64, 64), "key", weights=torch.ones(1, 2, 64))


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan")])
def test_weights_that_are_not_positive_are_refused(level: str, monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    monkeypatch.setenv("TESSERA_BACKEND", f"cpu:{level}")
    weights = torch.full((2, 3, 64), wrong)
    with pytest.raises(ValueError, match="weights of a channel's errors must be positive"):
        codecs.get("hqmq:4").encode(torch.randn(2, 3, 70, 64), "key", weights=weights)


def test_joint_codes_of_vectors_that_no_kernel_takes_are_made_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    steps = pack.pack_nearest
    monkeypatch.setattr(cpu_encode, "encode_joint", lambda *_, **__: pytest.fail("the kernel ran"))
    monkeypatch.setattr(
        cpu_encode, "pack_nearest", lambda x, scale, book, bits, **_: (calls.append(x), steps(x, scale, book, bits))[1]
    )
    codecs.get("hqmq:4").encode(torch.randn(1, 1, 5, 33), "key")
    assert len(calls) == 1
