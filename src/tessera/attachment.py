"""`attach` adds a memory to a model, `detach` takes it away again; only what was added is saved and loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tessera.associative.config import TensorCacheConfig
from tessera.associative.layer import TensorCacheLayer, is_gate
from tessera.associative.rotary import phase_of
from tessera.attention import disable, enable, unsupported
from tessera.cache.cache import read_config
from tessera.cache.layer import ATTACHED, ATTENTION
from tessera.files import atomic_path

M = TypeVar("M", bound=nn.Module)

#: Where an attention module keeps its memory.
MEMORY = "tensor_cache"


@dataclass
class Attachment:
    """What `attach` did to a model, so that it can be undone.

    Attributes:
        config: of the memory.
        layers: by index of the decoder layer.
        hooks: on the attention modules.
        frozen: parameters that learned before, and shall again.
        enabled: whether the model's attention was switched.
    """

    config: TensorCacheConfig
    layers: dict[int, TensorCacheLayer] = field(default_factory=dict)
    hooks: list[RemovableHandle] = field(default_factory=list)
    frozen: list[nn.Parameter] = field(default_factory=list)
    enabled: bool = False


def attachment(model: nn.Module) -> Attachment | None:
    """What is attached to `model`, if anything."""
    return getattr(model, ATTACHED, None)


def attach(model: M, config: TensorCacheConfig, *, freeze: bool = True) -> M:
    """Give a transformers causal model a Tensor Cache behind a window of its attention.

    Attention then sees the window and the sinks, the memory what has left the window. At first the memory adds nothing: the
    model is exactly the windowed one. Without a cache, or with transformers' own, every call computes the memory from the
    tokens it is given; `tessera.Cache("sink:4 + window:512 + tc", model)` keeps it.

    Args:
        model: a transformers causal language model.
        config: see `TensorCacheConfig`.
        freeze: only what is added learns.

    Returns:
        the model.

    Raises:
        ValueError: for a model that this cannot be done to, saying why; the model is as it was.
    """
    if not isinstance(config, TensorCacheConfig):
        raise TypeError(f"tessera.attach takes a TensorCacheConfig, got {type(config).__name__}")
    if attachment(model) is not None:
        raise ValueError(f"{type(model).__name__} has a memory attached already; call tessera.detach(model) first")
    why = unsupported(model)
    if why:
        raise ValueError(f"tessera.attach: {type(model).__name__} cannot be given a memory: {why}")
    text, shapes = read_config(model.config)
    modules = attention_modules(model, len(shapes))
    chosen = _chosen(config, [window is None for _, window in shapes])
    heads = text.num_attention_heads
    # Everything that may fail comes before anything is changed.
    layers = {}
    for index in chosen:
        (kv_heads, head_dim), _ = shapes[index]
        phase = None if config.rotary else phase_of(model, modules[index], head_dim)
        layers[index] = TensorCacheLayer(config, heads, kv_heads, head_dim, text.hidden_size, phase)
    enabled = text._attn_implementation != ATTENTION
    enable(model)
    frozen = [p for p in model.parameters() if p.requires_grad and freeze]
    for p in frozen:
        p.requires_grad_(False)
    device = next(model.parameters()).device
    for layer in layers.values():
        # Rates and matrices are computed in float32 whatever the model's dtype, so they are kept in it.
        layer.to(device)
    done = plug(model, config, layers, modules)
    done.frozen, done.enabled = frozen, enabled
    return model


def plug(
    model: nn.Module, config: TensorCacheConfig, layers: dict[int, TensorCacheLayer], modules: list[nn.Module]
) -> Attachment:
    """Put memories into a model's attention modules, both by layer."""
    done = Attachment(config, layers)
    for index, layer in layers.items():
        setattr(modules[index], MEMORY, layer)
        done.hooks.append(modules[index].register_forward_hook(_add))
    setattr(model, ATTACHED, done)
    return done


def detach(model: M) -> M:
    """Take the memory away; the model is what it was before `attach`, bit for bit. Returns the model.

    Raises:
        ValueError: if nothing is attached.
    """
    done = _attached(model)
    for hook in done.hooks:
        hook.remove()
    for module in model.modules():
        if isinstance(getattr(module, MEMORY, None), TensorCacheLayer):
            delattr(module, MEMORY)
    for p in done.frozen:
        p.requires_grad_(True)
    delattr(model, ATTACHED)
    if done.enabled:
        disable(model)
    return model


def memory_parameters(model: nn.Module) -> list[dict[str, Any]]:
    """What was added, as two groups for an optimizer: "weights", and "gates", which want a higher rate and no decay.

    Gates and rates that learn at the rate of weights are known never to open.
    """
    named = [pair for layer in _attached(model).layers.values() for pair in layer.named_parameters()]
    weights, gates = ([p for name, p in named if is_gate(name) == wanted] for wanted in (False, True))
    return [{"name": "weights", "params": weights}, {"name": "gates", "params": gates, "weight_decay": 0.0}]


def save_memory(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write what was attached, and nothing else, as safetensors with its config."""
    done = _attached(model)
    tensors = {f"{i}.{k}": v.detach().contiguous() for i, layer in done.layers.items() for k, v in layer.state_dict().items()}
    header = {"tessera_memory": json.dumps({"kind": "TensorCache", "config": done.config.to_dict(), "model": _shape(model)})}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, header)


def load_memory(model: M, path: str | os.PathLike[str]) -> M:
    """Attach what `save_memory` wrote. Returns the model.

    Raises:
        ValueError: if the file is damaged or was made for a model of another shape; the model is as it was.
    """
    with _opened(path) as file:
        try:
            about = json.loads((file.metadata() or {})["tessera_memory"])
            kind, fields, shape = about["kind"], about["config"], about["model"]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{os.fspath(path)} holds no memory that tessera.save_memory wrote") from None
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if kind != "TensorCache":
        raise ValueError(f"{os.fspath(path)} holds a memory of kind {kind!r}, which this version does not know")
    if shape != _shape(model):
        raise ValueError(f"this memory was trained for a model of shape {shape}; yours is {_shape(model)}")
    attach(model, TensorCacheConfig.from_dict(fields))
    try:
        _fill(_attached(model), tensors, os.fspath(path))
    except ValueError:
        detach(model)
        raise
    return model


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)} holds no memory that tessera.save_memory wrote: {error}") from None


def _fill(done: Attachment, tensors: dict[str, Tensor], path: str) -> None:
    for index, layer in done.layers.items():
        own = layer.state_dict()
        found = {name: tensors.pop(f"{index}.{name}", None) for name in own}
        for name, tensor in found.items():
            if tensor is None or tensor.shape != own[name].shape:
                raise ValueError(f"{path} is damaged: {name!r} of layer {index} is missing or of another shape")
        layer.load_state_dict(found)
    if tensors:
        raise ValueError(f"{path} is damaged: nothing here is called {min(tensors)!r}")


def _shape(model: Any) -> dict[str, Any]:
    """What a memory must know of its model."""
    text, layers = read_config(model.config)
    return {
        "type": text.model_type,
        "hidden": text.hidden_size,
        "heads": text.num_attention_heads,
        "layers": [[*shape, window] for shape, window in layers],
    }


def _attached(model: nn.Module) -> Attachment:
    done = attachment(model)
    if done is None:
        raise ValueError(f"nothing is attached to this {type(model).__name__}; see tessera.attach")
    return done


def attention_modules(model: nn.Module, count: int) -> list[nn.Module]:
    """The attention modules of the decoder, by layer.

    Raises:
        ValueError: if they are not found.
    """
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and type(module).__name__.endswith("Attention"):
            found.setdefault(index, module)
    if sorted(found) != list(range(count)):
        raise ValueError(f"{type(model).__name__}: found attention modules for layers {sorted(found)} of {count}")
    return [found[i] for i in range(count)]


def _chosen(config: TensorCacheConfig, whole: list[bool]) -> list[int]:
    """Layers that get a memory. Those with a window of their own never see what a memory could give back."""
    if config.layers is None:
        chosen = [i for i, sees_all in enumerate(whole) if sees_all]
        if not chosen:
            raise ValueError("every layer of this model has a sliding window of its own; nothing is left for a memory")
        return chosen
    count = len(whole)
    wrong = [i for i in config.layers if not -count <= i < count]
    if wrong:
        raise ValueError(f"layers names {wrong[0]}, but the model has {count} layers")
    return sorted({i % count for i in config.layers})


def _add(module: nn.Module, _inputs: Any, output: Any) -> Any:
    """Hook behind an attention module: add what the memory contributed."""
    layer: TensorCacheLayer = getattr(module, MEMORY)
    pending, layer.pending = layer.pending, None
    if pending is None:
        return output
    if isinstance(output, tuple):
        return (output[0] + pending.to(output[0].dtype), *output[1:])
    return output + pending.to(output.dtype)


def reading(model: nn.Module, on: bool) -> None:
    """Let reads count, or not: the control that shows what the memory is worth."""
    for layer in _attached(model).layers.values():
        layer.reads = on
