"""A Tensor Memory attached to image and video encoders passes one state from layer to layer."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

import tessera
from tessera.adapters import attached_memory
from tessera.tensor_memory import TensorMemoryConfig

CONFIG = TensorMemoryConfig.paper(channels=4, grid=(3, 3, 3), chunk=3, forget_bias=3.0)
SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
    "initializer_range": 0.3,
}


def vit(**changes: Any) -> Any:
    return ViTModel(ViTConfig(**{**SIZES, **changes}), add_pooling_layer=False)


def classifier() -> Any:
    return ViTForImageClassification(ViTConfig(**SIZES, num_labels=3))


def videomae() -> Any:
    return VideoMAEForVideoClassification(VideoMAEConfig(**SIZES, num_frames=4, tubelet_size=2, num_labels=3))


def timm_vit() -> Any:
    timm = pytest.importorskip("timm", reason="the vision extra (timm) is not installed")
    sizes = {"img_size": 12, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2}
    return timm.models.vision_transformer.VisionTransformer(**sizes, num_classes=3)


MODELS = {"vit": vit, "classifier": classifier, "videomae": videomae, "timm": timm_vit}


def make(name: str) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(3)
    model = MODELS[name]().eval()
    return model, torch.randn(2, 4, 3, 12, 12) if name == "videomae" else torch.randn(2, 3, 12, 12)


@torch.no_grad()
def outputs(model: Any, x: torch.Tensor) -> torch.Tensor:
    found = model(x)
    return found if isinstance(found, torch.Tensor) else found[0]


def layers_of(model: Any) -> Any:
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList | torch.nn.Sequential) and len(m) == 3)


@pytest.mark.parametrize("name", MODELS)
def test_it_is_attached_learns_is_saved_and_taken_away(name: str, tmp_path: Path) -> None:
    model, x = make(name)
    wanted = outputs(model, x)
    tessera.attach(model, TensorMemoryConfig(channels=4, grid=(3, 3)))
    assert torch.equal(outputs(model, x), wanted)
    tessera.detach(model)
    tessera.attach(model, CONFIG)
    found = outputs(model, x)
    assert (found - wanted).abs().max() > 1e-4
    assert torch.equal(outputs(model, x), found)
    result = model.train()(x)
    (result if isinstance(result, torch.Tensor) else result[0]).square().sum().backward()
    for own, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.abs().max() > 0)) == ("tensor_memory" in own), own
    tessera.save_memory(model.eval(), tmp_path / "m.safetensors")
    fresh = tessera.load_memory(make(name)[0], tmp_path / "m.safetensors")
    assert torch.equal(outputs(fresh, x), found)
    tessera.detach(model)
    assert torch.equal(outputs(model, x), wanted)
    assert "tensor_memory" not in "".join(model.state_dict())


@pytest.mark.parametrize("name", MODELS)
def test_the_state_goes_from_layer_to_layer(name: str) -> None:
    """The result equals an explicit loop, with an incomplete chunk at the end of each layer."""
    model, x = make(name)
    tessera.attach(model, CONFIG)
    done, kept = attached_memory(model), []
    layers = layers_of(model)
    norms = [next(m for n, m in layer.named_children() if n in ("layernorm_after", "norm2")) for layer in layers]
    for index, norm in enumerate(norms):
        norm.register_forward_pre_hook(lambda _, args, index=index: kept.append(args[0]))
    outputs(model, x)
    with_memory, kept = kept, []
    states, state = [], None
    with torch.no_grad():
        for index, y in enumerate(with_memory):
            before = x_of(model, layers, with_memory, index, x)
            read, state = done.shared.reference(done.layers[index].norm(before), state)
            state = done.shared.flush(state)
            states.append(state)
            torch.testing.assert_close(y, before + torch.sigmoid(torch.tensor(-2.0)) * read, rtol=1e-3, atol=1e-4)
    assert not torch.equal(states[0].h, states[1].h)


def x_of(model: Any, layers: Any, ys: list[torch.Tensor], index: int, images: torch.Tensor) -> torch.Tensor:
    """Return the residual stream between the attention of a layer and the memory."""
    given: list[torch.Tensor] = []
    layer = layers[index]
    norm = next(m for n, m in layer.named_children() if n in ("layernorm_after", "norm2"))
    if index == 0:
        hook = layer.register_forward_pre_hook(lambda _, args: given.append(args[0]))
        outputs(model, images)
        hook.remove()
        start = given.pop()
    else:
        start = tail(layers[index - 1], ys[index - 1])
    plain = [norm._forward_pre_hooks, layer._forward_hooks, layer._forward_pre_hooks]
    saved = [hooks.copy() for hooks in plain]
    for hooks in plain:
        hooks.clear()
    hook = norm.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    layer(start)
    hook.remove()
    for hooks, was in zip(plain, saved, strict=True):
        hooks.update(was)
    return given[0]


def tail(layer: Any, y: torch.Tensor) -> torch.Tensor:
    """Return y + mlp(norm(y)) for each kind of layer."""
    if hasattr(layer, "norm2"):
        return y + layer.mlp(layer.norm2.forward(y))
    normed = layer.layernorm_after.forward(y)
    return y + layer.mlp(normed) if hasattr(layer, "mlp") else layer.output(layer.intermediate(normed), y)


def test_without_threading_every_layer_begins_anew() -> None:
    model, x = make("vit")
    tessera.attach(model, CONFIG)
    threaded = outputs(model, x)
    memory = attached_memory(model)
    weights = {name: module.state_dict() for name, module in memory.modules().items()}
    tessera.detach(model)
    own = TensorMemoryConfig.from_dict({**CONFIG.to_dict(), "threaded": False})
    tessera.attach(model, own)
    for name, module in attached_memory(model).modules().items():
        module.load_state_dict(weights[name])
    assert (outputs(model, x) - threaded).abs().max() > 1e-6


def test_encoders_that_cannot_have_one_are_refused() -> None:
    bert = BertModel(BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    with pytest.raises(ValueError, match="nor an encoder of images"):
        tessera.attach(bert, CONFIG)
    model, x = make("vit")
    tessera.attach(model, CONFIG).train()
    # Its name before transformers 5.20.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(x)


def test_timm_refuses_what_is_no_plain_vit() -> None:
    timm = pytest.importorskip("timm", reason="the vision extra (timm) is not installed")
    with pytest.raises(ValueError, match="no plain ViT of timm"):
        tessera.attach(timm.create_model("resnet10t", pretrained=False), CONFIG)
    model, _ = make("timm")
    model.set_grad_checkpointing(True)
    with pytest.raises(ValueError, match="gradient checkpointing"):
        tessera.attach(model, CONFIG)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layers_that_scale_what_they_add_can_have_one(scale: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sizes = {name: value for name, value in SIZES.items() if name != "intermediate_size"}
    model = Dinov2Model(Dinov2Config(**sizes, layerscale_value=scale)).to(dtype).eval()
    x = torch.randn(2, 3, 12, 12, dtype=dtype)
    with torch.no_grad():
        before = model(x).last_hidden_state
        after = tessera.attach(model, CONFIG)(x).last_hidden_state
        assert not torch.equal(after, before)
        assert torch.equal(tessera.detach(model)(x).last_hidden_state, before)


@pytest.mark.parametrize("name", ["vit", "timm"])
def test_threads_that_share_an_encoder_compute_what_each_does_alone(name: str) -> None:
    model, x = make(name)
    tessera.attach(model, CONFIG)
    inputs = [torch.randn_like(x) for _ in range(4)]
    alone = [outputs(model, each) for each in inputs]
    found: list[list[Any]] = [[] for _ in inputs]

    def go(i: int) -> None:
        try:
            for _ in range(12):
                found[i].append(outputs(model, inputs[i]))
        except Exception as error:
            found[i].append(error)

    threads = [threading.Thread(target=go, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each, own in zip(found, alone, strict=True):
        assert all(isinstance(out, torch.Tensor) and torch.equal(out, own) for out in each), each


@pytest.mark.parametrize("name", ["vit", "timm"])
def test_a_call_of_an_encoder_within_another_and_one_that_stops_early_change_nothing(name: str) -> None:
    model, x = make(name)
    tessera.attach(model, CONFIG)
    other = torch.randn_like(x)
    wanted, other_wanted = outputs(model, x), outputs(model, other)
    inner: list[Any] = []

    def again(*_: Any) -> None:
        if not inner:
            inner.append(None)
            inner[0] = outputs(model, other)

    def stop(*_: Any) -> None:
        raise RuntimeError("stopped")

    hook = layers_of(model)[1].register_forward_pre_hook(again)
    assert torch.equal(outputs(model, x), wanted)
    assert torch.equal(inner[0], other_wanted)
    hook.remove()
    hook = layers_of(model)[2].register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stopped"):
        outputs(model, x)
    hook.remove()
    assert torch.equal(outputs(model, x), wanted)
    # A layer called alone has no state from an earlier layer.
    with pytest.raises(ValueError, match="layer 1 ran without layer 0 before it"), torch.no_grad():
        layers_of(model)[1](torch.randn(2, 10, 24))
