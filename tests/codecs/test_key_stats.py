"""Key statistics for quantisation: how they are measured, how they reduce the error, and their files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tessera import codecs
from tessera.codecs.channel_stats import KeyStats, load_stats, save_stats
from tessera.codecs.feedback import feedback
from tessera.codecs.hqmq_joint import words_of
from tessera.codecs.rotation import rotation
from tessera.kernels import dispatch


def drawn(seed: int, batch: int = 1, heads: int = 2, tokens: int = 256, dim: int = 64) -> tuple[Tensor, Tensor]:
    """Draw queries and keys (batch, heads, tokens, dim) with channels of different widths; keys have different means."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, batch, heads, tokens, dim, generator=generator).unbind(0)
    w, s = (1.2 * torch.randn(2, batch, heads, 1, dim, generator=generator)).exp().unbind(0)
    return q * w, k * s + 3 * torch.randn(batch, heads, 1, dim, generator=generator) * s


def coded(k: Tensor, stats: KeyStats | None, codec: codecs.Codec) -> Tensor:
    """Return keys after encoding and decoding."""
    if stats is None:
        return codec.decode(codec.encode(k, "key"))
    packed = codec.encode(k * stats.widths.unsqueeze(2), "key", weights=stats.weights)
    return codec.decode(packed) * stats.narrowing.unsqueeze(2)


def score_error(q: Tensor, k: Tensor, found: Tensor) -> float:
    """Return the mean square error of scores, relative to the mean square of scores of centred keys."""
    error, size = (q @ x.mT for x in (found - k, k - k.mean(2, keepdim=True)))
    return float(error.square().mean() / size.square().mean())


@pytest.mark.parametrize("bits", [3, 4])
def test_scores_are_nearer_than_those_of_keys_as_they_came(bits: int) -> None:
    codec = codecs.get(f"hqmq:{bits}")
    for seed in range(3):
        q, k = drawn(seed)
        stats = KeyStats.measure(q[:, :, :128].square(), k[:, :, :128])
        rest = q[:, :, 128:], k[:, :, 128:]
        plain, seen = (score_error(*rest, coded(k, one, codec)[:, :, 128:]) for one in (None, stats))
        assert seen < 0.5 * plain


def test_steering_errors_and_widening_channels_are_each_worth_something() -> None:
    codec = codecs.get("hqmq:4")
    q, k = drawn(5)
    stats = KeyStats.measure(q.square(), k)
    whole = score_error(q, k, coded(k, stats, codec))
    unsteered = codec.decode(codec.encode(k * stats.widths.unsqueeze(2), "key")) * stats.narrowing.unsqueeze(2)
    assert whole < 0.9 * score_error(q, k, unsteered)
    assert score_error(q, k, unsteered) < score_error(q, k, coded(k, None, codec))


def test_a_rescaled_head_is_seen_as_the_same() -> None:
    """Powers of two with mean one change no bit of the codes; other factors change the error only slightly."""
    codec = codecs.get("hqmq:4")
    q, k = drawn(1)
    steps = torch.randint(-1, 2, (32,)).float()
    factor = torch.exp2(torch.cat((steps, -steps)))
    before, after = (KeyStats.measure((q / f).square(), k * f) for f in (torch.ones(64), factor))
    assert torch.equal(before.sizes & 7, after.sizes & 7)
    assert torch.equal(before.widths, after.widths * factor)
    for name, one in codec.encode(k * before.widths.unsqueeze(2), "key", weights=before.weights).tensors.items():
        other = codec.encode(k * factor * after.widths.unsqueeze(2), "key", weights=after.weights).tensors[name]
        assert torch.equal(one, other)
    error = score_error(q, k, coded(k, before, codec))
    for seed in range(3):
        factor = (1.2 * torch.randn(64, generator=torch.Generator().manual_seed(seed))).exp()
        stats = KeyStats.measure((q / factor).square(), k * factor)
        assert score_error(q / factor, k * factor, coded(k * factor, stats, codec)) == pytest.approx(error, rel=0.1)


def test_pairs_of_a_rotary_embedding_are_given_the_same() -> None:
    q, k = drawn(2, dim=16)
    partner = [*range(8, 16), *range(8)]
    sizes = KeyStats.measure(q.square(), k, partner).sizes
    assert torch.equal(sizes[..., :8], sizes[..., 8:])
    assert not torch.equal(KeyStats.measure(q.square(), k).sizes, sizes)
    alone = KeyStats.measure(q.square(), k, range(16)).sizes
    assert torch.equal(alone, KeyStats.measure(q.square(), k).sizes)


def test_a_row_does_not_depend_on_the_others() -> None:
    q, k = drawn(3, batch=3, dim=32)
    whole = KeyStats.measure(q.square(), k)
    for row in range(3):
        one = slice(row, row + 1)
        assert torch.equal(whole.sizes[one], KeyStats.measure(q[one].square(), k[one]).sizes)
    order = torch.tensor([2, 0, 0])
    assert torch.equal(whole.select(order).sizes, whole.sizes[order])


@pytest.mark.parametrize(
    ("q", "k"),
    [
        (torch.zeros(1, 1, 128, 16), torch.zeros(1, 1, 128, 16)),
        (torch.ones(1, 1, 128, 16), torch.full((1, 1, 128, 16), 1000.0)),
        (torch.randn(1, 1, 128, 16) * 1e-20, torch.randn(1, 1, 128, 16) * 1e3),
    ],
)
def test_degenerate_channels_leave_all_numbers_finite(q: Tensor, k: Tensor) -> None:
    stats = KeyStats.measure(q.square(), k)
    for x in (stats.widths, stats.narrowing, stats.weights):
        assert x.isfinite().all()
        assert (x > 0).all()
    found = coded(k, stats, codecs.get("hqmq:4"))
    assert (found - k).norm() <= 0.2 * k.norm()


def test_feedback_is_the_block_factor_of_the_metric() -> None:
    weights = torch.rand(2, 3, 32) + 0.01
    basis = rotation(32)
    upper = feedback(weights, basis)
    metric = basis @ torch.diag_embed(weights) @ basis.T
    unit = upper.mT + torch.eye(32)
    inverse = torch.linalg.inv(unit)
    middle = inverse @ metric @ inverse.mT
    chunk = torch.arange(32) // 4
    assert middle[..., chunk[:, None] != chunk].abs().max() < 1e-5
    assert (upper[..., chunk[:, None] >= chunk] == 0).all()
    assert (feedback(torch.full((1, 32), 3.0), basis).abs() < 1e-5).all()


def test_feedback_lowers_the_weighed_error() -> None:
    book = words_of(16)
    words = torch.zeros(1 << 16, 4)
    words[book.codes] = book.products.float() * book.step
    weights = torch.exp2(-torch.rand(2, 16) * 8)
    basis = rotation(16)
    metric = basis @ torch.diag_embed(weights) @ basis.T
    x = torch.randn(2, 200, 16)
    errors = []
    for upper in (torch.zeros(2, 16, 16), feedback(weights, basis)):
        e = words[dispatch.encode_feedback(x, upper, book).long()].flatten(-2) - x
        errors.append(float((e @ metric * e).sum()))
    assert errors[1] < 0.7 * errors[0]


def test_codecs_without_use_for_weights_leave_them_out() -> None:
    k = torch.randn(1, 2, 64, 32)
    for spec in ("hqmq:4_nostats", "hqmq:4_norot", "kivi:4", "q4_0", "hqmq:s96_r4"):
        codec = codecs.get(spec)
        assert not codec.weighs
        plain, told = (codec.encode(k, "key", weights=w).tensors for w in (None, torch.rand(1, 2, 32)))
        assert all(torch.equal(plain[name], told[name]) for name in plain)
    assert codecs.get("hqmq:k4v3").weighs
    assert not codecs.get("(k=q8_0,v=hqmq:4)").weighs


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    q, k = drawn(4, dim=16)
    stats = [KeyStats.measure(q.square(), k), None, KeyStats.measure(k.square(), q)]
    save_stats(stats, tmp_path / "s")
    found = load_stats(tmp_path / "s")
    assert [None if one is None else one.sizes.tolist() for one in found] == [
        None if one is None else one.sizes.tolist() for one in stats
    ]


def test_other_files_are_refused_in_one_line(tmp_path: Path) -> None:
    good = {"tessera_key_stats": "1", "layers": "1"}
    sizes = torch.zeros(1, 2, 16, dtype=torch.uint8)
    for name, tensors, header, match in (
        ("other", {"0": sizes}, {}, "is no file of key statistics"),
        ("later", {"0": sizes}, good | {"tessera_key_stats": "9"}, "its header says 9"),
        ("more", {"0": sizes, "1": sizes.clone()}, good, "is damaged: 1 layers"),
        ("count", {"0": sizes}, good | {"layers": "-1"}, "is damaged: -1 layers"),
        ("huge", {"0": sizes}, good | {"layers": "9" * 30}, "is damaged"),
        ("rows", {"0": sizes.expand(2, -1, -1).contiguous()}, good, "is damaged: layer 0 is torch.uint8 of shape"),
        ("dtype", {"0": sizes.float()}, good, "is damaged: layer 0 is torch.float32"),
    ):
        save_file(tensors, tmp_path / name, header)
        with pytest.raises(ValueError, match=match) as caught:
            load_stats(tmp_path / name)
        assert "\n" not in str(caught.value)
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="is no file of key statistics"):
        load_stats(tmp_path / "text")
    with pytest.raises(FileNotFoundError):
        load_stats(tmp_path / "absent")
