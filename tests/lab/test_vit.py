"""`ViT` processes images, clips and streams of frames, sees only what it should, and can be saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tessera.lab.models import ViT, ViTConfig
from tessera.lab.models.vit import to_patches
from tessera.lab.models.vit_state import ViTState

SIZES: dict[str, Any] = {
    "image_size": 6,
    "patch_size": 3,
    "num_channels": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "classes": 5,
}
MEMORY = {"channels": 3, "grid": (3, 3), "chunk": 3, "gate_init": 1.0}
KINDS = {
    "all": {"attention": "all"},
    "all, memory": {"attention": "all", "memory": MEMORY},
    "frame": {"attention": "frame", "positions": "sincos"},
    "frame, memory": {"attention": "frame", "memory": MEMORY},
    "all, anchored": {"attention": "all", "memory": {**MEMORY, "anchored": True}},
    "frame, anchored": {"attention": "frame", "memory": {**MEMORY, "anchored": True}},
    "window, anchored": {"attention": "window:3", "memory": {**MEMORY, "grid": (2, 3, 3), "anchored": True}},
    "window, memory": {"attention": "window:3", "memory": {**MEMORY, "every": 2}, "positions": "sincos"},
}
STREAMS = [name for name in KINDS if not name.startswith("all")]


def make(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return ViT(ViTConfig(**{**SIZES, **KINDS[kind], **changes})).eval()


def clip(frames: int = 7, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, frames, 2, 6, 6)


@torch.no_grad()
def logits(model: Any, x: torch.Tensor) -> torch.Tensor:
    return model(x).logits


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_a_clip_of_one_frame(kind: str) -> None:
    model, x = make(kind), clip(1)
    assert logits(model, x).shape == (2, 1, 5)
    assert torch.equal(logits(model, x[:, 0]), logits(model, x)[:, 0])


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("cuts", [(1,) * 7, (3, 4), (6, 1)])
def test_streams_equal_whole_clips(kind: str, cuts: tuple[int, ...]) -> None:
    model, x = make(kind), clip()
    parts, state = [], None
    with torch.no_grad():
        for part in x.split(list(cuts), dim=1):
            out = model(part, state)
            parts.append(out.logits)
            state = out.state
    torch.testing.assert_close(torch.cat(parts, 1), logits(model, x), rtol=1e-4, atol=1e-4)
    assert state.frames == 7


@pytest.mark.parametrize("kind", STREAMS)
def test_no_output_depends_on_a_later_frame(kind: str) -> None:
    model, x = make(kind), clip(batch=1)
    y = x.clone()
    y[:, 4] += 1
    change = (logits(model, x) - logits(model, y)).abs().amax(-1)[0]
    assert change[:4].max() == 0
    assert change[4] > 0


def test_a_frame_sees_its_window_and_what_is_behind_it_through_the_memory_alone() -> None:
    x = clip(batch=1)
    y = x.clone()
    y[:, 0] += 1
    for kind, reach in (("frame", 1), ("frame, memory", 7), ("window, memory", 7)):
        change = (logits(make(kind), x) - logits(make(kind), y)).abs().amax(-1)[0]
        assert (change > 0).nonzero().max() == reach - 1, kind
    plain = make("window, memory", memory=None)
    change = (logits(plain, x) - logits(plain, y)).abs().amax(-1)[0]
    # Each of three layers sees two frames further back.
    assert (change > 0).all()
    one = make("window, memory", memory=None, num_hidden_layers=1)
    assert (logits(one, x) - logits(one, y)).abs().amax(-1)[0, 3:].max() == 0


@pytest.mark.parametrize("kind", STREAMS)
def test_the_state_stays_as_large_as_it_is(kind: str) -> None:
    model, state, sizes = make(kind), None, []
    with torch.no_grad():
        for _ in range(12):
            state = model(clip(1), state).state
            sizes.append(state.nbytes)
    assert sizes[5] == sizes[8] == sizes[11]


def test_a_state_that_is_detached_stops_the_gradient() -> None:
    model, x = make("window, memory"), clip(2).requires_grad_()
    state = model(x).state
    assert torch.autograd.grad(model(clip(1), state).logits.sum(), x)[0].abs().max() > 0
    assert torch.autograd.grad(model(clip(1), state.detach()).logits.sum(), x, allow_unused=True)[0] is None


@pytest.mark.parametrize("kind", KINDS)
def test_everything_learns(kind: str) -> None:
    model = make(kind, classes=0).train()
    masked = torch.rand(2, 3, 4) < 0.5
    model(clip(3), masked=masked).logits.square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    model, x = make(kind), clip()
    model.save_pretrained(tmp_path)
    loaded = ViT.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded.eval(), x), logits(model, x))
    assert loaded.config.attention == model.config.attention


def test_a_memory_starts_as_it_was_made() -> None:
    memory = make("frame, memory", memory={**MEMORY, "sigma_init": 0.7, "forget_bias": 2.0}).memory
    sigma = torch.nn.functional.softplus(memory.sigma_net.bias.detach())
    assert float(sigma) == pytest.approx(0.7, abs=1e-3)
    assert memory.gates_bias[3:6].tolist() == [2.0] * 3


def test_hidden_patches_are_not_seen() -> None:
    model, x = make("all", classes=0), clip(1)
    masked = torch.tensor([[[True, False, False, True]]]).expand(2, 1, 4)
    y = x.clone()
    y[..., :3, :3] += 1
    with torch.no_grad():
        assert torch.equal(model(x, masked=masked).logits, model(y, masked=masked).logits)
        y[..., :3, 3:] += 1
        assert not torch.equal(model(x, masked=masked).logits, model(y, masked=masked).logits)


def test_patches_are_cut_row_by_row() -> None:
    x = torch.arange(2 * 4 * 6.0).view(1, 2, 4, 6)
    cut = to_patches(x, 2)
    assert cut.shape == (1, 6, 8)
    assert torch.equal(cut[0, 4], x[0, :, 2:4, 2:4].flatten())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 4}, "patch_size 4 does not divide image_size 6"),
        ({"hidden_size": 18}, "must be a multiple of twice"),
        ({"positions": "rotary"}, "'learned' or 'sincos', got 'rotary'"),
        ({"attention": "window"}, "'window' in 'window' needs a whole number of frames"),
        ({"attention": "window:0"}, "number of frames of at least 1, as in 'window:4'; got '0'"),
        ({"attention": "frame", "memory": {"threaded": True}}, "would show frames to those before them"),
        ({"memory": {"anchored": True, "grid": (4,)}}, "two or three axes"),
        ({"memory": {"chanels": 2}}, "has no 'chanels'"),
    ],
)
def test_models_that_cannot_be_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViTConfig(**{**SIZES, **fields})


def test_input_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"do not fit: expected \(batch, \[frames,\] 2, 6, 6\)"):
        make("all")(torch.zeros(1, 1, 6, 6))
    state = make("frame")(clip(1)).state
    with pytest.raises(ValueError, match="keeps no state"):
        make("all")(clip(1), state)
    with pytest.raises(ValueError, match="classes=0"):
        make("all", classes=0)(clip(1))


def test_patches_of_an_anchored_memory_are_where_they_are_in_their_frame() -> None:
    model, asked = make("window, anchored"), []
    model.memory.register_forward_pre_hook(lambda _, arguments: asked.append(arguments[2]))
    logits(model, clip(4))
    corners = [(-1, -1), (1, -1), (-1, 1), (1, 1)]  # two patches a side; x first
    expected = torch.tensor([(x, y, t) for t in (-1, 0, 1, -1) for x, y in corners], dtype=torch.float32)
    torch.testing.assert_close(asked[0], expected)


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_goes_on_from_a_saved_state(kind: str, tmp_path: Path) -> None:
    model, x = make(kind), clip()
    with torch.no_grad():
        model(x[:, :4]).state.save(tmp_path / "state.safetensors")
        state = ViTState.load(tmp_path / "state.safetensors").to("cpu")
        output = model(x[:, 4:], state)
        torch.testing.assert_close(output.logits, logits(model, x)[:, 4:], rtol=1e-4, atol=1e-5)
        second = model(x[1:, 4:], state.select(torch.tensor([1])))
        torch.testing.assert_close(second.logits, output.logits[1:], rtol=1e-4, atol=1e-5)
    assert state.nbytes == sum(t.numel() * t.element_size() for t in state.tensors().values())


def test_files_that_hold_no_state_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    with pytest.raises(ValueError, match="is a folder"):
        ViTState.load(tmp_path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="holds no state of a ViT"):
        ViTState.load(path)
    state = make("frame, memory")(clip(2)).state
    tensors = {name: t.detach().contiguous() for name, t in state.tensors().items()}
    save_file(tensors, path)
    with pytest.raises(ValueError, match="holds no state of a ViT"):
        ViTState.load(path)
    for damage in ({"0.memory.h": torch.full_like(tensors["0.memory.h"], float("nan"))}, {"other": torch.zeros(2)}):
        save_file({**tensors, **damage}, path, {"tessera": "vit_state", "frames": "2"})
        with pytest.raises(ValueError, match="is damaged"):
            ViTState.load(path)


def test_a_state_that_does_not_fit_is_refused() -> None:
    model, x = make("frame, memory"), clip(2)
    state = model(x).state
    for other, given, message in (
        (model, clip(1, batch=3), r"\(2, 2, 0, 8\) does not fit: expected \(3, 2, patches, 8\)"),
        (make("frame, memory", num_hidden_layers=2), x, "a state of 3 layers does not fit a model of 2"),
        (make("frame"), x, "of a model with a memory in layer 0"),
        (make("window, memory"), x, "of a model with a memory in layer 0"),
        (model, x[:, :0], "one frame at least"),
    ):
        with pytest.raises(ValueError, match=message):
            other(given, state)
