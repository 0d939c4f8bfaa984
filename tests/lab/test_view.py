"""Pictures of a memory show its reads and writes, from a saved state, a stream, or a clip of a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

pytest.importorskip("accelerate", reason="the extra lab is not installed")

import tessera
from tessera.adapters.apply import read_shared
from tessera.cli import app
from tessera.lab.evaluation.traces import follow, follow_backbone, follow_vit, read_stream, sizes
from tessera.lab.evaluation.view_plot import animate, plot_state, plot_trace
from tessera.lab.models import ViT, ViTConfig
from tessera.lab.models.backbones import BackboneConfig, build_backbone
from tessera.lab.models.small_gpt import GPT, GPTConfig
from tessera.lab.training import diagnostics_training as training
from tessera.tensor_cache import TensorCacheConfig
from tessera.tensor_memory import TensorMemory, TensorMemoryConfig


def run(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["view", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def pixels(path: Path) -> Any:
    from matplotlib.image import imread

    return imread(path)


def frames(path: Path) -> int:
    from PIL import Image

    with Image.open(path) as image:
        return int(getattr(image, "n_frames", 1))


@pytest.mark.parametrize(("grid", "chunk", "read"), [((3, 4, 5), 1, 1), ((4, 5), 2, 2), ((6,), 3, 3)])
def test_a_trace_is_what_the_memory_did(grid: tuple[int, ...], chunk: int, read: int) -> None:
    memory = TensorMemory(TensorMemoryConfig(channels=4, grid=grid, chunk=chunk), 8)
    x = torch.randn(7, 8)
    trace = follow(memory, x, 0.5)
    steps = 7 // chunk
    assert trace.steps == steps
    assert trace.size.shape == (steps + 1, *grid)
    assert trace.read.shape == (steps, read, len(grid))
    with torch.no_grad():
        _, state = memory(x[None, : steps * chunk])
    torch.testing.assert_close(trace.size[-1], state.h[0].norm(dim=0))
    assert not trace.size[0].any()
    # By default writes and reads share an address.
    torch.testing.assert_close(trace.read.mean(1), trace.written)
    assert trace.gate == 0.5


def test_every_layer_of_a_backbone_is_followed() -> None:
    memory = TensorMemoryConfig(channels=4, grid=(4, 4))
    config = BackboneConfig(5, 2, width=16, heads=2, hidden=16, layers=3, memory=memory)
    model = build_backbone(config)
    x = torch.randn(6, 5)
    traces = follow_backbone(model, x)
    assert [trace.gate for trace in traces] == pytest.approx([0.1192] * 3, abs=1e-4)
    assert not torch.equal(traces[0].size, traces[1].size)
    first = model.layers[0]
    with torch.no_grad():
        stream = model.embed(x[None])
        given = first.memory_norm(stream + first.attention(first.attention_norm(stream), model.mask(6)))
    torch.testing.assert_close(traces[0].size, follow(model.memory, given[0]).size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind 'plain' has no memory"):
        follow_backbone(build_backbone(BackboneConfig(5, 2, "plain", width=16, heads=2)), x)


@pytest.mark.parametrize("grid", [(3, 4, 5), (4, 5), (6,)])
def test_grids_of_every_number_of_axes_are_drawn(grid: tuple[int, ...], tmp_path: Path) -> None:
    memory = TensorMemory(TensorMemoryConfig(channels=4, grid=grid), 8)
    trace = follow(memory, torch.randn(9, 8))
    plot_state(trace.size[-1], tmp_path / "state.png", "a state")
    plot_trace([trace], tmp_path / "trace.png")
    animate([trace], tmp_path / "memory.gif", frames=4)
    assert frames(tmp_path / "memory.gif") == 3  # every third of nine steps
    empty = tmp_path / "empty.png"
    plot_state(trace.size[0], empty, "a state")
    full, none = pixels(tmp_path / "state.png"), pixels(empty)
    assert full.std() > 0.01
    assert full.shape != none.shape or not np.array_equal(full, none)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.png", "memory.gif", "state.png", "trace.png"]


def test_a_saved_state_is_drawn(tmp_path: Path) -> None:
    memory = TensorMemory(TensorMemoryConfig(channels=4, grid=(3, 3, 3)), 8)
    with torch.no_grad():
        memory(torch.randn(2, 5, 8))[1].save(tmp_path / "state.safetensors")
    out = tmp_path / "pictures"
    code, said, _ = run("--state", tmp_path / "state.safetensors", "--sequence", 1, "--out", out)
    assert code == 0
    assert [path.name for path in out.iterdir()] == ["state.png"]
    assert "state.png" in said
    assert run("--state", tmp_path / "state.safetensors", "--sequence", 2, "--out", out)[0] == 2


def test_a_stream_goes_through_a_memory_of_given_weights(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32))
    memory = TensorMemory(TensorMemoryConfig(channels=4, grid=(3, 5)), 6)
    save_file(memory.state_dict(), tmp_path / "weights.safetensors")
    words = ("--stream", tmp_path / "x.npy", "--grid", "3x5", "--channels", 4, "--out", tmp_path / "out")
    assert run(*words, "--weights", tmp_path / "weights.safetensors")[0] == 0
    assert frames(tmp_path / "out" / "memory.gif") == 8
    given = pixels(tmp_path / "out" / "state.png")
    assert run(*words)[0] == 0
    assert not np.array_equal(given, pixels(tmp_path / "out" / "state.png"))
    assert run(*words, "--update", "all")[0] == 0
    every = pixels(tmp_path / "out" / "state.png")
    assert run(*words, "--paper")[0] == 0
    papers = pixels(tmp_path / "out" / "state.png")
    assert run(*words, "--paper", "--update", "footprint")[0] == 0
    other = pixels(tmp_path / "out" / "state.png")
    assert not any(np.array_equal(*pair) for pair in ((every, papers), (papers, other)))
    code, _, err = run(*words, "--weights", tmp_path / "weights.safetensors", "--paper")
    assert code == 2
    assert "does not fit this memory" in err


def test_a_clip_of_a_task_is_learned_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "MEASURED", 8)
    code, out, _ = run("--task", "occlusion", "--steps", 1, "--out", tmp_path)
    assert code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory.gif", "state.png", "trace.png"]
    assert frames(tmp_path / "memory.gif") == 8
    assert str(tmp_path / "memory.gif") in out.replace("\n", "")


def test_streams_are_read_from_either_kind_of_file(tmp_path: Path) -> None:
    x = torch.randn(4, 3)
    save_file({"x": x.double(), "y": x[:1]}, tmp_path / "two.safetensors")
    save_file({"only": x}, tmp_path / "one.safetensors")
    np.save(tmp_path / "x.npy", x.numpy())
    for name in ("two.safetensors", "one.safetensors", "x.npy"):
        torch.testing.assert_close(read_stream(tmp_path / name), x)
    state = TensorMemory(TensorMemoryConfig(channels=2, grid=(2,)), 3).initial_state(1)
    with pytest.raises(ValueError, match="of 1 sequences; there is no sequence 1"):
        sizes(state, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--state", "{tmp}/none"], "there is no state at"),
        (["--state", "{tmp}/x.npy"], "holds no state of a Tensor Memory"),
        (["--state", "{tmp}/two.safetensors"], "holds no state of a Tensor Memory"),
        (["--state", "{tmp}/x.npy", "--task", "map"], "give one of --state, --stream, --model and --task"),
        (["--stream", "{tmp}/none"], "there is no stream at"),
        (["--stream", "{tmp}/text.npy"], "holds no stream"),
        (["--stream", "{tmp}/two.safetensors"], "holds a, b; a stream is the tensor x"),
        (["--stream", "{tmp}/flat.npy"], "a stream is (tokens, dim)"),
        (["--stream", "{tmp}/x.npy", "--grid", "6by6"], "--grid is as in 6x6x6 or 8x8, got '6by6'"),
        (["--stream", "{tmp}/x.npy", "--weights", "{tmp}/none"], "there are no weights at"),
        (["--weights", "{tmp}/x.npy"], "--weights are those of the memory of --stream"),
        (["--task", "maps"], "no task 'maps'"),
        (["--model", "{tmp}/none"], "there is no model at"),
        (["--clip", "{tmp}"], "--clip is what a --model sees"),
        (["--stream", "{tmp}/x.npy", "--update", "some"], "update must be one of 'footprint', 'all'"),
        (["--stream", "{tmp}/x.npy", "--out", "{tmp}/x.npy"], "--out must be a folder"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((4, 3), np.float32))
    np.save(tmp_path / "flat.npy", np.zeros(4, np.float32))
    (tmp_path / "text.npy").write_text("text")
    save_file({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}, tmp_path / "two.safetensors")
    given = [word.format(tmp=tmp_path) for word in words]
    code, _, err = run(*given, *(() if "--out" in given else ("--out", tmp_path / "out")))
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("attention", ["all", "frame"])
@pytest.mark.parametrize("memory", [{"grid": (3, 3), "chunk": 3}, {"grid": (2, 3, 3), "anchored": True}])
def test_every_layer_of_a_vit_is_followed(attention: str, memory: dict[str, Any]) -> None:
    fields = {"image_size": 6, "patch_size": 3, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3}
    model = ViT(ViTConfig(**fields, attention=attention, memory={"channels": 3, "gate_init": 1.0, **memory})).eval()
    clip, ends = torch.rand(3, 1, 6, 6), []
    for layer in model.memory_layers.values():
        layer.register_forward_hook(lambda _, __, result: ends.append(result[1]))
    traces = follow_vit(model, clip)
    assert len(traces) == len(ends) == 3
    for trace, end in zip(traces, ends, strict=True):
        torch.testing.assert_close(trace.size[-1], end.h[0].detach().norm(dim=0))
        assert trace.gate == pytest.approx(0.7311, abs=1e-3)
        assert trace.gate_at_first == pytest.approx(trace.gate)
    # In bidirectional models the state is passed from layer to layer.
    assert bool(traces[1].size[0].any()) == (attention == "all")
    with pytest.raises(ValueError, match="no memory to look at"):
        follow_vit(ViT(ViTConfig(**fields)), clip)


def test_a_trained_vit_is_drawn_on_digits_and_on_a_folder_of_frames(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    from PIL import Image

    ViT(ViTConfig(image_size=32, patch_size=8, attention="frame", memory={"channels": 3, "grid": (4, 4)})).save_pretrained(
        tmp_path / "model"
    )
    assert run("--model", tmp_path / "model", "--out", tmp_path / "digits")[0] == 0
    assert frames(tmp_path / "digits" / "memory.gif") == 64  # every fourth step of 16 frames of 16 patches
    (tmp_path / "clip").mkdir()
    for i in range(2):
        Image.new("L", (40, 40), 90 * i).save(tmp_path / "clip" / f"{i}.png")
    assert run("--model", tmp_path / "model", "--clip", tmp_path / "clip", "--out", tmp_path / "folder")[0] == 0
    assert frames(tmp_path / "folder" / "memory.gif") == 32


def test_a_model_of_pixels_sees_all_of_them() -> None:
    memory = {"channels": 3, "grid": (3, 3)}
    model = ViT(ViTConfig(image_size=6, patch_size=3, hidden_size=16, num_attention_heads=2, classes=0, memory=memory)).eval()
    assert follow_vit(model, torch.rand(1, 1, 6, 6))[0].steps == 4


def test_models_that_cannot_be_looked_at_are_refused_in_one_line(tmp_path: Path) -> None:
    GPTConfig(vocab_size=8).save_pretrained(tmp_path / "gpt")
    ViTConfig(image_size=16, memory={"channels": 2, "grid": (2, 2)}).save_pretrained(tmp_path / "empty")
    ViT(ViTConfig(image_size=16, patch_size=4, memory={"channels": 2, "grid": (2, 2)})).save_pretrained(tmp_path / "small")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text((tmp_path / "small" / "config.json").read_text())
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"nothing")
    for name, message in (
        ("gpt", "holds no ViT of Tessera: it is a"),
        ("empty", "holds no ViT of Tessera"),
        ("damaged", "holds no ViT of Tessera"),
        ("small", "give it a --clip"),
    ):
        code, _, err = run("--model", tmp_path / name, "--out", tmp_path / "out")
        assert (code, message in err, err.count("\n")) == (2, True, 1)


def test_an_attached_memory_is_followed_as_it_was_saved(tmp_path: Path) -> None:
    model = GPT(
        GPTConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, head_dim=4)
    )
    tessera.attach(model, TensorMemoryConfig(channels=4, grid=(3, 5), chunk=2))
    tessera.save_memory(model, tmp_path / "memory.safetensors")
    x = torch.randn(8, 8)
    save_file({"x": x}, tmp_path / "x.safetensors")
    words = ("--stream", tmp_path / "x.safetensors", "--out", tmp_path / "out")
    assert run(*words, "--weights", tmp_path / "memory.safetensors")[0] == 0
    assert frames(tmp_path / "out" / "memory.gif") == 4
    memory = read_shared(tmp_path / "memory.safetensors")
    shared: Any = model.tensor_memory["shared"]
    torch.testing.assert_close(follow(memory, x).size, follow(shared, x).size)
    tessera.detach(model)
    tessera.attach(model, TensorCacheConfig(window=4))
    tessera.save_memory(model, tmp_path / "cache.safetensors")
    with safe_open(tmp_path / "memory.safetensors", "pt") as file:
        found, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file({**found, "shared.sigma_net.bias": torch.full((1,), float("nan"))}, tmp_path / "nan.safetensors", header)
    with pytest.raises(ValueError, match="not finite"):
        read_shared(tmp_path / "nan.safetensors")
    code, _, err = run(*words, "--weights", tmp_path / "cache.safetensors")
    assert (code, "holds a TensorCache, not a Tensor Memory" in err) == (2, True)
