"""The C++ kernels agree with their definition in PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_inputs import NoKernel, make_pages, relative

from tessera import codecs, kernels
from tessera.codecs import Packed
from tessera.codecs.codebooks import joint
from tessera.codecs.hqmq_joint import JointHQMQ
from tessera.kernels import AttendParams, CompressedKV, cpu, dispatch, reference
from tessera.kernels.bits import pack_bits

pytestmark = pytest.mark.skipif(cpu.MISSING is not None, reason=str(cpu.MISSING))

#: Maximum relative error of float32 sums in another order.
FLOAT = 1e-5
SPECS = ("hqmq:2", "hqmq:2.5", "hqmq:3", "hqmq:3.5", "hqmq:4")


#: With three limbs the queries are as exact as float32 sums.
attend = partial(cpu.attend, limbs=3)


@pytest.fixture(params=cpu.levels())
def level(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "queries", "sizes", "dim"),
    [
        (1, 4, 1, 1, [64], 64),
        (2, 4, 2, 1, [128, 320, 37], 128),
        (1, 6, 2, 3, [1024, 1], 80),
        (2, 2, 2, 37, [192, 65], 96),
        (1, 4, 2, 64, [128, 70], 64),
        (1, 3, 1, 2, [17], 256),
        (1, 4, 4, 2, [100], 4),
        (1, 2, 1, 1, [70], 20),
    ],
)
def test_attention_equals_the_reference(
    level: str, spec: str, batch: int, heads: int, kv_heads: int, queries: int, sizes: list[int], dim: int
) -> None:
    pages = make_pages(codecs.get(spec), batch, kv_heads, sizes, dim)
    q = torch.randn(batch, heads, queries, dim)
    out, lse = attend(q, pages, AttendParams(dim**-0.5), level=level)
    wanted, wanted_lse = reference.attend(q, pages, AttendParams(dim**-0.5))
    assert relative(out, wanted) < FLOAT
    assert torch.allclose(lse, wanted_lse, atol=1e-4, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["hqmq:4.5", "hqmq:5"])
def test_attention_over_wide_codes_equals_the_reference(level: str, spec: str) -> None:
    pages = make_pages(codecs.get(spec), 2, 2, [128, 77], 96)
    q = torch.randn(2, 4, 3, 96)
    out, lse = attend(q, pages, AttendParams(0.1), level=level)
    wanted, wanted_lse = reference.attend(q, pages, AttendParams(0.1))
    assert relative(out, wanted) < FLOAT
    assert torch.allclose(lse, wanted_lse, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("bits", [4, 4.5, 5])
def test_every_code_is_read_as_its_codeword(level: str, bits: float) -> None:
    """Attention to a single token returns its value for any codes. Random codes avoid the cost of encoding."""
    codec = JointHQMQ(bits, centre=False)
    codes = torch.randint(len(joint(codec.code_bits).codewords), (1, 2, 1, 16))
    tensors = {"codes": pack_bits(codes, codec.code_bits), "scale": torch.full((1, 2, 1), 131, dtype=torch.uint8)}
    values = Packed(codec, tensors, (1, 2, 1, 64), torch.float32)
    keys = replace(values, role="key")
    q = torch.randn(1, 2, 1, 64)
    out, lse = attend(q, CompressedKV([(keys, values)]), AttendParams(0.5), level=level)
    assert relative(out, values.decode()) < FLOAT
    assert torch.allclose(lse, (q * keys.decode()).sum(-1) * 0.5, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("variant", [{"rotate": False}, {"centre": False}, {"rotate": False, "centre": False}])
def test_attention_without_rotation_or_centre_equals_the_reference(level: str, variant: dict[str, bool]) -> None:
    pages = make_pages(JointHQMQ(4, **variant), 1, 2, [64, 50], 64)
    q = torch.randn(1, 4, 2, 64)
    out, _ = attend(q, pages, AttendParams(0.125), level=level)
    assert relative(out, reference.attend(q, pages, AttendParams(0.125))[0]) < FLOAT


@pytest.mark.parametrize(
    "rule",
    [
        {"start": 0},
        {"start": 150},
        {"start": 165, "window": 40},
        {"start": 400, "window": 100},
        {"softcap": 2.0},
        {"mask": "rows"},
        {"mask": "heads"},
        {"mask": "columns", "start": 160, "softcap": 5.0},
    ],
)
def test_masks_windows_and_caps_equal_the_reference(level: str, rule: dict[str, Any]) -> None:
    pages = make_pages(codecs.get("hqmq:4"), 2, 2, [128, 64], 64)
    q = torch.randn(2, 4, 20, 64)
    rule = dict(rule)
    if rule.get("mask") == "rows":
        rule["mask"] = torch.rand(2, 1, 20, 192) > 0.3
    elif rule.get("mask") == "heads":
        rule["mask"] = torch.rand(1, 4, 20, 192) > 0.3
    elif rule.get("mask") == "columns":
        rule["mask"] = (torch.rand(2, 1, 20, 300) > 0.3)[..., 50:242]  # a view, as the cache gives it
    out, lse = attend(q, pages, AttendParams(0.2, **rule), level=level)
    wanted, wanted_lse = reference.attend(q, pages, AttendParams(0.2, **rule))
    assert relative(out, wanted) < FLOAT
    assert torch.equal(lse == -torch.inf, wanted_lse == -torch.inf)
    seen = wanted_lse > -torch.inf
    assert torch.allclose(lse[seen], wanted_lse[seen], atol=1e-4, rtol=1e-5)


def test_what_sees_nothing_is_zero(level: str) -> None:
    pages = make_pages(codecs.get("hqmq:3"), 1, 1, [64], 64)
    mask = torch.zeros(1, 1, 2, 64, dtype=torch.bool)
    mask[..., 1, 5] = True
    out, lse = attend(torch.randn(1, 2, 2, 64), pages, AttendParams(1.0, mask), level=level)
    assert (out[:, :, 0] == 0).all()
    assert (lse[:, :, 0] == -torch.inf).all()
    assert (out[:, :, 1] != 0).any()
    assert torch.isfinite(lse[:, :, 1]).all()


def test_slices_that_begin_inside_a_group_equal_the_reference(level: str) -> None:
    whole = make_pages(codecs.get("hqmq:4"), 1, 2, [200], 64).pages[0]
    pages = CompressedKV([(whole[0].slice(13, 171), whole[1].slice(13, 171))])
    q = torch.randn(1, 4, 1, 64)
    assert (
        relative(attend(q, pages, AttendParams(0.1), level=level)[0], reference.attend(q, pages, AttendParams(0.1))[0]) < FLOAT
    )


def test_zero_vectors_huge_ones_and_other_dtypes_equal_the_reference(level: str) -> None:
    codec = codecs.get("hqmq:4")
    k, v = torch.randn(2, 1, 1, 64, 64).unbind(0)
    k[:, :, 3:9], v[:, :, 5] = 0, 0
    v[:, :, 7] *= 1e4
    pages = CompressedKV([(codec.encode(k.bfloat16(), "key"), codec.encode(v.bfloat16()))])
    q = torch.randn(1, 2, 3, 64).bfloat16()
    q[:, :, 1] = 0
    out, _ = attend(q, pages, AttendParams(0.125), level=level)
    exact = CompressedKV([(codec.encode(k.bfloat16().float(), "key"), codec.encode(v.bfloat16().float()))])
    assert relative(out, reference.attend(q.float(), exact, AttendParams(0.125))[0]) < FLOAT


@pytest.mark.skipif(cpu.OPENMP is None, reason="torch has loaded no OpenMP runtime here")
def test_torch_and_the_kernels_share_threads() -> None:
    assert "torch" in str(cpu.OPENMP)
    assert torch.__config__.parallel_info().count("OpenMP")


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_the_result(threads: int, shared: bool) -> None:
    pages = make_pages(codecs.get("hqmq:3"), 1, 1, [1024, 1024, 1024, 333], 64)
    q = torch.randn(1, 2, 1, 64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        if not shared:
            cpu._cpu.use_openmp(0, 0)
        for _ in range(5):
            out, lse = attend(q, pages, AttendParams(0.1))
    finally:
        torch.set_num_threads(before)
        cpu._share_threads()
    wanted, wanted_lse = reference.attend(q, pages, AttendParams(0.1))
    assert relative(out, wanted) < FLOAT
    assert torch.allclose(lse, wanted_lse, atol=1e-4)


@pytest.mark.parametrize("by_hand", [level for level in cpu.levels() if level != "portable"])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dim", [20, 64])
def test_specialised_kernels_run_where_they_should(by_hand: str, spec: str, dim: int) -> None:
    """Only specialised kernels write queries in limbs; in the portable loops two limbs equal three."""
    pages = make_pages(codecs.get(spec), 1, 2, [64, 50], dim)
    q = torch.randn(1, 6, 1, dim)
    two, three = (cpu.attend(q, pages, AttendParams(0.1), level=by_hand, limbs=limbs)[0] for limbs in (2, 3))
    assert not torch.equal(two, three)
    assert relative(two, three) < 1e-3
    plain = (cpu.attend(q, pages, AttendParams(0.1), level="portable", limbs=limbs)[0] for limbs in (2, 3))
    assert torch.equal(*plain)


@pytest.mark.parametrize("level", [level for level in cpu.levels() if level != "portable"])
@pytest.mark.parametrize(("limbs", "bound"), [(1, 1e-2), (2, 2e-4), (3, FLOAT)])
def test_limbs_bound_the_error(level: str, limbs: int, bound: float) -> None:
    codec, (k, v) = codecs.get("hqmq:4"), torch.randn(2, 1, 2, 700, 128)
    pages = CompressedKV([(codec.encode(k, "key"), codec.encode(v))])
    q = torch.randn(1, 8, 1, 128)
    error = relative(
        cpu.attend(q, pages, AttendParams(128**-0.5), level=level, limbs=limbs)[0],
        reference.attend(q, pages, AttendParams(128**-0.5))[0],
    )
    assert error < bound
    if limbs < 3:
        assert error > bound / 1000  # so that the argument has an effect


@pytest.mark.parametrize("peak", [5.5, 6.4, 8.0])
def test_many_small_weights_beside_large_ones_are_not_lost(level: str, peak: float) -> None:
    """In every block one token has far more weight than each of the many others."""
    k, v = torch.zeros(1, 1, 4096, 64), 1 + torch.randn(1, 1, 4096, 64)
    k[..., 0] = 1e-3 * torch.randn(4096)
    k[:, :, ::256, 0] = peak
    k[:, :, 0, 0] = 2 * peak
    codec = JointHQMQ(4, centre=False)
    pages = CompressedKV([(codec.encode(k, "key"), codec.encode(v))])
    q = torch.zeros(1, 1, 1, 64)
    q[..., 0] = 1
    error = relative(cpu.attend(q, pages, AttendParams(1.0), level=level)[0], reference.attend(q, pages, AttendParams(1.0))[0])
    assert error < 1e-3


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_query_gives_nan_and_harms_no_other(level: str, bad: float) -> None:
    pages = make_pages(codecs.get("hqmq:4"), 1, 1, [64], 64)
    q = torch.randn(1, 2, 3, 64)
    sound = attend(q, pages, AttendParams(0.1), level=level)[0]
    q[0, 1, 2, 7] = bad
    out, lse = attend(q, pages, AttendParams(0.1), level=level)
    assert out[0, 1, 2].isnan().all()
    assert lse[0, 1, 2].isnan()
    out[0, 1, 2] = sound[0, 1, 2]
    assert torch.equal(out, sound)


def test_no_queries_give_nothing(level: str) -> None:
    pages = make_pages(codecs.get("hqmq:4"), 1, 1, [64], 64)
    out, lse = attend(torch.randn(1, 2, 0, 64), pages, AttendParams(0.1), level=level)
    assert out.shape == (1, 2, 0, 64)
    assert lse.shape == (1, 2, 0)


def test_no_keys_are_seen_by_nobody(level: str) -> None:
    pages = make_pages(codecs.get("hqmq:4"), 1, 1, [0], 64)
    out, lse = attend(torch.randn(1, 2, 1, 64), pages, AttendParams(0.1), level=level)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_damaged_codes_are_read_as_something_finite(level: str) -> None:
    codec = codecs.get("hqmq:4")
    k = torch.randn(1, 1, 64, 64)
    keys, values = codec.encode(k, "key"), codec.encode(k)
    for packed in (keys, values):
        packed.tensors["codes"].fill_(255)
    out, lse = attend(torch.randn(1, 1, 1, 64), CompressedKV([(keys, values)]), AttendParams(0.1), level=level)
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()


def test_backends_are_chosen_forced_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    real = cpu.attend
    monkeypatch.setattr(cpu, "attend", lambda *a, **k: (ran.append(str(k["level"])), real(*a, **k))[1])
    pages = make_pages(codecs.get("hqmq:4"), 1, 1, [64], 64)
    q = torch.randn(1, 1, 1, 64)
    dispatch.attend(q, pages, AttendParams(0.1))
    dispatch.attend(q, pages, AttendParams(0.1), backend="cpu:portable")
    assert ran in (["None", "portable"], [cpu.levels()[-1], "portable"])
    dispatch.attend(q, pages, AttendParams(0.1), backend="reference")
    monkeypatch.setenv("TESSERA_BACKEND", "reference")
    dispatch.attend(q, pages, AttendParams(0.1))
    assert len(ran) == 2
    monkeypatch.setenv("TESSERA_BACKEND", "fpga")
    with pytest.raises(ValueError, match="no backend 'fpga'; there are auto, reference, cpu"):
        dispatch.attend(q, pages, AttendParams(0.1))
    monkeypatch.delenv("TESSERA_BACKEND")
    other = make_pages(NoKernel(), 1, 1, [64], 64)
    dispatch.attend(q, other, AttendParams(0.1))
    assert len(ran) == 2
    with pytest.raises(ValueError, match="no kernel for no-kernel"):
        dispatch.attend(q, other, AttendParams(0.1), backend="cpu")


@pytest.mark.slow
def test_where_no_compiler_works_a_wheel_without_kernels_is_built(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), str(root)]
    done = subprocess.run(command, env={**os.environ, "CC": "/bin/false", "CXX": "/bin/false"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "tessera/kernels/cpu/__init__.py" in names
    assert not [name for name in names if name.endswith(".so")]


def test_without_kernels_the_definition_runs_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = make_pages(codecs.get("hqmq:4"), 1, 1, [64], 64)
    q = torch.randn(1, 1, 1, 64)
    with_kernels = dispatch.attend(q, pages, AttendParams(0.1))[0]
    monkeypatch.setattr(cpu, "MISSING", "no compiler was there")
    dispatch.say_once.cache_clear()
    with pytest.warns(UserWarning, match="plain PyTorch, which is slow: no compiler was there"):
        without = dispatch.attend(q, pages, AttendParams(0.1))[0]
    assert relative(with_kernels, without) < 1e-3
    for spec in ("hqmq:4", "hqmq:s24_r2"):
        dispatch.say_once.cache_clear()
        with pytest.warns(UserWarning, match="the search for the nearest codeword runs in plain PyTorch"):
            codecs.get(spec).encode(torch.randn(1, 1, 2, 64)).decode()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codecs.get("hqmq:4").encode(torch.randn(1, 1, 2, 64)).decode()
    with pytest.raises(ValueError, match="backend 'cpu' cannot run: no compiler was there"):
        dispatch.attend(q, pages, AttendParams(0.1), backend="cpu")


def test_shapes_that_do_not_fit_are_refused() -> None:
    pages = make_pages(codecs.get("hqmq:4"), 1, 2, [64], 64)
    with pytest.raises(ValueError, match="do not fit keys"):
        attend(torch.randn(1, 3, 1, 64), pages, AttendParams(0.1))
    with pytest.raises(ValueError, match="does not fit"):
        attend(torch.randn(1, 2, 1, 64), pages, AttendParams(0.1, torch.ones(1, 1, 1, 63, dtype=torch.bool)))


@pytest.mark.parametrize(
    ("spec", "tables"), [("hqmq:2", 1), ("hqmq:2.5", 1), ("hqmq:3", 4), ("hqmq:3.5", 0), ("hqmq:4", 6), ("hqmq:5", 0)]
)
def test_codewords_are_picked_in_registers_where_the_tables_are_few(spec: str, tables: int) -> None:
    form = codecs.get(spec).kernel_format(64)
    assert form is not None
    assert cpu._joint(form).blocks == tables


@pytest.mark.parametrize("spec", [*SPECS, "hqmq:4_norot", "hqmq:4_nocentre"])
@pytest.mark.parametrize(("tokens", "dim"), [(200, 64), (65, 80), (3, 128), (0, 64)])
def test_decoding_equals_the_definition(level: str, spec: str, tokens: int, dim: int) -> None:
    codec = codecs.get(spec)
    assert isinstance(codec, JointHQMQ)
    for role, packed in zip(("key", "value"), make_pages(codec, 2, 2, [tokens], dim).pages[0], strict=True):
        for part in (packed, packed.slice(13, 150)):
            got = cpu.decode(part, level)
            assert got is not None
            assert got.shape == part.shape
            assert relative(got, codec.decode_reference(part)) < FLOAT, role


def test_decoding_takes_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = codecs.get("hqmq:4").encode(torch.randn(1, 1, 4, 64).bfloat16())
    monkeypatch.setattr(JointHQMQ, "decode_reference", lambda *_: pytest.fail("the definition ran"))
    assert packed.decode().dtype == torch.bfloat16
    monkeypatch.setenv("TESSERA_BACKEND", "reference")
    with pytest.raises(pytest.fail.Exception, match="the definition ran"):
        packed.decode()


@pytest.mark.parametrize("spec", ["hqmq:4", "hqmq:s96_r4_med3", "int:4"])
def test_decoding_by_every_backend_is_the_definition(spec: str) -> None:
    packed = codecs.get(spec).encode(torch.randn(2, 3, 70, 64), "key")
    wanted = packed.codec.decode_reference(packed)
    assert torch.equal(kernels.decode(packed, "reference"), wanted)
    for backend in ("auto", *(f"cpu:{level}" for level in cpu.levels())):
        assert relative(kernels.decode(packed, backend), wanted) < 1e-5
