"""`attach` adds a memory to a model and `detach` removes it; only the memory's weights are saved and loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tessera.adapters import add_tensor_cache, add_tensor_memory
from tessera.adapters.attached import (
    AttachedMemory,
    attached_memory,
    fingerprint,
    read_fingerprint,
    require_attached,
    same_fingerprint,
    wrapped,
)
from tessera.cache.ranks import ranks_of
from tessera.cache_layers.cache_layer import ATTACHED
from tessera.devices import device_of
from tessera.files import WHOLE, atomic_path, brief, open_tensors, read_json
from tessera.tensor_cache.gated_read import TensorCacheLayer, is_gate
from tessera.tensor_cache.tensor_cache_config import TensorCacheConfig
from tessera.tensor_memory.gated_layer import make_layers, make_memory
from tessera.tensor_memory.tensor_memory import TensorMemory
from tessera.tensor_memory.tensor_memory_config import TensorMemoryConfig
from tessera.wrapped import unwrap_to_change, unwrap_to_read

M = TypeVar("M", bound=nn.Module)
_CONFIGS: dict[str, Any] = {"TensorCache": TensorCacheConfig, "TensorMemory": TensorMemoryConfig}
#: Dtypes in which weights may be stored; they are loaded as float32.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def attach(model: M, config: TensorCacheConfig | TensorMemoryConfig, *, freeze: bool = True) -> M:
    """Attach a memory to a model.

    With a `TensorCacheConfig`, a transformers causal model gets a Tensor Cache behind a window of its attention. Attention then
    sees the window and the sinks, and the memory absorbs what leaves the window. At first the memory adds nothing: the model is
    exactly the windowed one. Without a cache, or with transformers' own, every call computes the memory from the tokens it is
    given; `tessera.Cache("sink:4 + window:512 + tc", model)` keeps it.

    With a `TensorMemoryConfig`, a transformers causal model, or a transformers or timm image or video encoder, gets a Tensor
    Memory between attention and MLP of its layers; see `tessera.adapters.add_tensor_memory`. At first it adds nothing, unless
    `config.gate_init` says otherwise. Its state is kept on the cache that is passed from call to call, of any class.

    The added weights are in float32 and stay so, whatever the model's dtype and torch's default. They are on the device where
    their layer computes, also in a model that accelerate spreads over devices or offloads; a Tensor Memory's weights, which all
    layers share, and its states are on the device of the first layer.

    Args:
        model: a model of the kinds above, by itself or adapted by peft. One that `DistributedDataParallel`, `DataParallel`,
            FSDP or `torch.compile` has wrapped already is refused, because these do not notice parameters that are added later.
        config: configuration of the memory.
        freeze: make the memory's parameters the only trainable ones.

    Returns:
        the model.

    Raises:
        ValueError: for a model that cannot have the memory, saying why; the model is not changed.
    """
    if not isinstance(config, TensorCacheConfig | TensorMemoryConfig):
        raise TypeError(f"tessera.attach takes a TensorCacheConfig or a TensorMemoryConfig, got {type(config).__name__}")
    whole = unwrap_to_change(model, "tessera.attach")
    if attached_memory(whole) is not None:
        raise ValueError(f"{type(whole).__name__} has a memory attached already; call tessera.detach(model) first")
    ranks = ranks_of(whole)
    if ranks is not None:
        raise ValueError(
            f"tessera.attach: this {type(whole).__name__} is tensor-parallel: its heads are spread over {ranks.size} processes "
            "and a memory needs them together; load the model without tp_plan, and train with DistributedDataParallel"
        )
    own = [p for p in whole.parameters() if p.requires_grad and freeze]
    # Everything that may fail comes before the first change.
    done = (
        add_tensor_cache.add(whole, config) if isinstance(config, TensorCacheConfig) else add_tensor_memory.add(whole, config)
    )
    done.frozen = own
    for p in own:
        p.requires_grad_(False)
    _place(whole, done)
    return model


def _place(model: nn.Module, done: AttachedMemory) -> None:
    """Move the added modules to the devices where they compute."""
    if done.kind == "TensorCache":
        layers = add_tensor_cache.attention_modules(model, len(done.shape["layers"]))
    else:
        layers = add_tensor_memory.find(model).layers
    for index, module in done.layers.items():
        device = device_of(layers[index])
        if device is not None:
            module.to(device)
    first = device_of(layers[min(done.layers)])
    if done.shared is not None and first is not None:
        done.shared.to(first)


def detach(model: M) -> M:
    """Remove the memory; the model is then what it was before `attach`, bit for bit. Returns the model.

    Raises:
        ValueError: if nothing is attached.
    """
    whole = unwrap_to_change(model, "tessera.detach")
    done = require_attached(whole)
    for hook in done.hooks:
        hook.remove()
    _home(done.kind).remove(whole, done)
    for p in done.frozen:
        p.requires_grad_(True)
    delattr(whole, ATTACHED)
    return model


def memory_parameters(model: nn.Module) -> list[dict[str, Any]]:
    """Group the memory's parameters for an optimizer: "weights", and "gates", which need a higher rate and no decay.

    Gates and rates that learn at the rate of weights tend never to open.
    """
    named = [pair for module in require_attached(model).modules().values() for pair in module.named_parameters()]
    weights, gates = ([p for name, p in named if is_gate(name) == wanted] for wanted in (False, True))
    return [{"name": "weights", "params": weights}, {"name": "gates", "params": gates, "weight_decay": 0.0}]


def save_memory(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the attached memory, and nothing else, as safetensors with its config.

    Adapters that peft has put around parts of the memory, as LoRA does with target_modules="all-linear", are merged into the
    weights that are written, so that the file gives the memory's present outputs; in the model they stay separate.

    Where FSDP2 has spread the model over processes, with the memory's parameters ignored, every process has to call this.

    Raises:
        ValueError: if nothing is attached, or if parts of it were replaced by what cannot be merged, or if the
            model is in a wrapper that has spread its parameters; nothing is written.
    """
    model = unwrap_to_read(model, "tessera.save_memory")
    done = require_attached(model)
    tensors: dict[str, Tensor] = {}
    for place, part in done.modules().items():
        found = _merged(part)
        if strange := sorted(found.keys() ^ done.names[place]):
            raise ValueError(
                f"tessera.save_memory: {strange[0]!r} of {_where(place)} of the memory was added or taken away since "
                "tessera.attach, so a file could not be loaded again; undo that first, for peft with merge_and_unload()"
            )
        tensors |= {f"{place}.{name}": tensor.detach().contiguous() for name, tensor in found.items()}
    about = {"kind": done.kind, "config": done.config.to_dict(), "model": done.shape, "weights": fingerprint(model)}
    header = {"tessera_memory": json.dumps(about)}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, header)


def _merged(part: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a part of a memory under their own names, with the adapters around them merged in."""
    found = part.state_dict()
    for place in wrapped(part):
        copy: Any = deepcopy(part.get_submodule(place))
        try:
            if not getattr(copy, "disable_adapters", False):
                copy.merge(safe_merge=True)
            elif copy.merged:
                copy.unmerge()
            core = copy.get_base_layer().state_dict()
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"tessera.save_memory: the {type(copy).__name__} around {place!r} cannot be merged into it: {brief(error)}"
            ) from None
        found = {name: tensor for name, tensor in found.items() if not name.startswith(f"{place}.")}
        found |= {f"{place}.{name}": tensor for name, tensor in core.items()}
    return found


def load_memory(model: M, path: str | os.PathLike[str], *, strict: bool = True) -> M:
    """Attach a memory that `save_memory` wrote. Returns the model.

    Args:
        model: the one that the memory was trained for, in any precision.
        path: path of the file.
        strict: refuse a model with other weights; if False, only its shape must fit.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or was made for another model; the model is not changed.
    """
    file = os.fspath(path)
    whole = unwrap_to_change(model, "tessera.load_memory")
    about, tensors = _read(path)
    kind, shape = about["kind"], about["model"]
    own = _home(kind).shape_of(whole)
    if shape != own:
        raise ValueError(f"{file}: this memory was trained for a model of shape {brief(shape)}; yours is {own}")
    if strict and not same_fingerprint(about["weights"], fingerprint(whole)):
        raise ValueError(
            f"{file} was trained for a model of the same shape with other weights; load_memory(..., strict=False) "
            "takes it nevertheless"
        )
    config = about["config"]
    _check(_skeleton(config, own, file), tensors, file)
    try:
        attach(model, config)
    except ValueError as error:
        raise ValueError(f"{file}: {brief(error, WHOLE)}") from None
    for place, module in require_attached(whole).modules().items():
        module.load_state_dict({name: tensors[f"{place}.{name}"] for name in module.state_dict()})
    return model


def read_shared(path: str | os.PathLike[str]) -> TensorMemory:
    """Load the Tensor Memory of a file that `save_memory` wrote, without a model.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, or of a memory of another kind.
    """
    file = os.fspath(path)
    about, tensors = _read(path)
    if about["kind"] != "TensorMemory":
        raise ValueError(f"{file} holds a {about['kind']}, not a Tensor Memory")
    own = {name: x for name, x in tensors.items() if name.startswith("shared.")}
    probe = own.get("shared.coord_net.weight")
    if probe is None or probe.ndim != 2:
        raise ValueError(f"{file} is damaged: 'coord_net.weight' of all layers is missing or of another shape")
    config, dim = about["config"], probe.shape[1]
    _check({"shared": _skeleton(config, {"hidden": dim, "layers": config.every}, file)["shared"]}, own, file)
    memory = TensorMemory(config, dim)
    memory.load_state_dict({name.removeprefix("shared."): tensor for name, tensor in own.items()})
    return memory


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file: its description of the memory, the config, and the tensors."""
    name = os.fspath(path)
    with open_tensors(path, "holds no memory that tessera.save_memory wrote") as file:
        try:
            about = read_json(file.metadata["tessera_memory"])
            found = {key: about[key] for key in ("kind", "config", "model")}
            found["weights"] = read_fingerprint(about["weights"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{name} holds no memory that tessera.save_memory wrote") from None
        tensors = {key: file.get(key) for key in file.names}
    kind = found["kind"]
    if not isinstance(kind, str) or kind not in _CONFIGS:
        raise ValueError(f"{name} holds a memory of kind {brief(kind)!r}, which this version does not know")
    try:
        found["config"] = _CONFIGS[kind].from_dict(found["config"])
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{name} is damaged: its config is none: {brief(error)}") from None
    return found, tensors


def _home(kind: str) -> Any:
    return add_tensor_cache if kind == "TensorCache" else add_tensor_memory


def _where(place: str) -> str:
    return "all layers" if place == "shared" else f"layer {place}"


def _skeleton(config: Any, shape: dict[str, Any], path: str) -> dict[str, nn.Module]:
    """Make what `attach` would add to a model of this shape, without allocating weights, since a file may claim any size."""
    try:
        with torch.device("meta"):
            if isinstance(config, TensorMemoryConfig):
                layers = make_layers(config, shape["hidden"], shape["layers"])
                return {"shared": make_memory(config, shape["hidden"]), **{str(i): layer for i, layer in layers.items()}}
            every = shape["layers"]
            chosen = [i for i, (_, _, window) in enumerate(every) if window is None]
            if config.layers is not None:
                chosen = sorted({i % len(every) for i in config.layers})
            sizes = {i: (shape["heads"], every[i][0], every[i][1], shape["hidden"]) for i in chosen}
            return {str(i): TensorCacheLayer(config, *size) for i, size in sizes.items()}
    except (TypeError, ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{path} is damaged: its config is none: {brief(error)}") from None


def _check(modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], path: str) -> None:
    """Refuse tensors that do not match those of the modules."""
    strange = set(tensors)
    for place, module in modules.items():
        for name, own in module.state_dict().items():
            tensor = tensors.get(f"{place}.{name}")
            strange.discard(f"{place}.{name}")
            if tensor is None or tensor.shape != own.shape:
                raise ValueError(f"{path} is damaged: {name!r} of {_where(place)} is missing or of another shape")
            if tensor.dtype not in _DTYPES:
                raise ValueError(f"{path} is damaged: {name!r} of {_where(place)} is of {tensor.dtype}")
            if not tensor.isfinite().all():
                raise ValueError(f"{path} is damaged: {name!r} has numbers that are not finite")
    if strange:
        raise ValueError(f"{path} is damaged: nothing here is called {brief(min(strange))!r}")
