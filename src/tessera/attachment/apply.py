"""`attach` adds a memory to a model, `detach` takes it away again; only what was added is saved and loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tessera.associative.config import TensorCacheConfig
from tessera.associative.layer import is_gate
from tessera.attachment import associative, spatial
from tessera.attachment.record import alike, attached, attachment, read_sample, sampled
from tessera.cache.layer import ATTACHED
from tessera.files import atomic_path
from tessera.spatial.config import TensorMemoryConfig
from tessera.spatial.memory import TensorMemory
from tessera.wrapped import unwrap_to_change, unwrap_to_read

M = TypeVar("M", bound=nn.Module)
_CONFIGS: dict[str, Any] = {"TensorCache": TensorCacheConfig, "TensorMemory": TensorMemoryConfig}


def attach(model: M, config: TensorCacheConfig | TensorMemoryConfig, *, freeze: bool = True) -> M:
    """Give a model a memory.

    With a `TensorCacheConfig`, a transformers causal model gets a Tensor Cache behind a window of its attention. Attention then
    sees the window and the sinks, the memory what has left the window. At first the memory adds nothing: the model is exactly
    the windowed one. Without a cache, or with transformers' own, every call computes the memory from the tokens it is given;
    `tessera.Cache("sink:4 + window:512 + tc", model)` keeps it.

    With a `TensorMemoryConfig`, a transformers causal model, or a transformers or timm image or video encoder, gets a Tensor
    Memory between attention and MLP of its layers; see `tessera.attachment.spatial`. At first it adds nothing, unless
    `config.gate_init` says otherwise. What it has read stays with the cache that is passed on, whichever that is.

    Args:
        model: see above, by itself or adapted by peft. One that `DistributedDataParallel`, `DataParallel`, FSDP or
            `torch.compile` has wrapped already is refused, because these do not notice what is added behind their back.
        config: of the memory.
        freeze: only what is added learns.

    Returns:
        the model.

    Raises:
        ValueError: for a model that this cannot be done to, saying why; the model is as it was.
    """
    if not isinstance(config, TensorCacheConfig | TensorMemoryConfig):
        raise TypeError(f"tessera.attach takes a TensorCacheConfig or a TensorMemoryConfig, got {type(config).__name__}")
    outer, model = model, unwrap_to_change(model, "tessera.attach")
    if attachment(model) is not None:
        raise ValueError(f"{type(model).__name__} has a memory attached already; call tessera.detach(model) first")
    own = [p for p in model.parameters() if p.requires_grad and freeze]
    # Whatever may fail does so before anything is changed.
    done = associative.add(model, config) if isinstance(config, TensorCacheConfig) else spatial.add(model, config)
    done.frozen = own
    for p in own:
        p.requires_grad_(False)
    device = next(model.parameters()).device
    for module in done.modules().values():
        # Rates and matrices are computed in float32 whatever the model's dtype, so they are kept in it.
        module.to(device)
    return outer


def detach(model: M) -> M:
    """Take the memory away; the model is what it was before `attach`, bit for bit. Returns the model.

    Raises:
        ValueError: if nothing is attached.
    """
    outer, model = model, unwrap_to_change(model, "tessera.detach")
    done = attached(model)
    for hook in done.hooks:
        hook.remove()
    _home(done.kind).remove(model, done)
    for p in done.frozen:
        p.requires_grad_(True)
    delattr(model, ATTACHED)
    return outer


def memory_parameters(model: nn.Module) -> list[dict[str, Any]]:
    """What was added, as two groups for an optimizer: "weights", and "gates", which want a higher rate and no decay.

    Gates and rates that learn at the rate of weights are known never to open.
    """
    named = [pair for module in attached(model).modules().values() for pair in module.named_parameters()]
    weights, gates = ([p for name, p in named if is_gate(name) == wanted] for wanted in (False, True))
    return [{"name": "weights", "params": weights}, {"name": "gates", "params": gates, "weight_decay": 0.0}]


def save_memory(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write what was attached, and nothing else, as safetensors with its config.

    Raises:
        ValueError: if nothing is attached, or the model is in a wrapper that has spread its parameters.
    """
    model = unwrap_to_read(model, "tessera.save_memory")
    done = attached(model)
    tensors = {f"{i}.{k}": v.detach().contiguous() for i, part in done.modules().items() for k, v in part.state_dict().items()}
    about = {"kind": done.kind, "config": done.config.to_dict(), "model": done.shape, "weights": sampled(model)}
    header = {"tessera_memory": json.dumps(about)}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, header)


def load_memory(model: M, path: str | os.PathLike[str], *, strict: bool = True) -> M:
    """Attach what `save_memory` wrote. Returns the model.

    Args:
        model: the one that the memory was trained for, in any precision.
        path: of the file.
        strict: refuse a model whose weights are others; without it, its shape alone must fit.

    Raises:
        ValueError: if the file is damaged or was made for another model; the model is as it was.
    """
    outer, model = model, unwrap_to_change(model, "tessera.load_memory")
    about, tensors = _read(path)
    kind, fields, shape, weights = about["kind"], about["config"], about["model"], about["weights"]
    own = _home(kind).shape_of(model)
    if shape != own:
        raise ValueError(f"this memory was trained for a model of shape {shape}; yours is {own}")
    if strict and not alike(weights, sampled(model)):
        raise ValueError(
            f"{os.fspath(path)} was trained for a model of the same shape with other weights; load_memory(..., strict=False) "
            "takes it nevertheless"
        )
    attach(model, _CONFIGS[kind].from_dict(fields))
    try:
        _fill(attached(model).modules(), tensors, os.fspath(path))
    except ValueError:
        detach(model)
        raise
    return outer


def read_shared(path: str | os.PathLike[str]) -> TensorMemory:
    """The Tensor Memory of a file that `save_memory` wrote, by itself, without a model.

    Raises:
        ValueError: if the file is damaged, or of a memory of another kind.
    """
    about, tensors = _read(path)
    if about["kind"] != "TensorMemory":
        raise ValueError(f"{os.fspath(path)} holds a {about['kind']}, not a Tensor Memory")
    own = {name: x for name, x in tensors.items() if name.startswith("shared.")}
    try:
        memory = TensorMemory(TensorMemoryConfig.from_dict(about["config"]), own["shared.coord_net.weight"].shape[1])
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{os.fspath(path)} is damaged: {error!r}") from None
    _fill({"shared": memory}, own, os.fspath(path))
    return memory


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a file says about its memory, and its tensors."""
    with _opened(path) as file:
        try:
            about = json.loads((file.metadata() or {})["tessera_memory"])
            found = {name: about[name] for name in ("kind", "config", "model")}
            found["weights"] = read_sample(about["weights"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{os.fspath(path)} holds no memory that tessera.save_memory wrote") from None
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if found["kind"] not in _CONFIGS:
        raise ValueError(f"{os.fspath(path)} holds a memory of kind {found['kind']!r}, which this version does not know")
    return found, tensors


def _home(kind: str) -> Any:
    return associative if kind == "TensorCache" else spatial


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)} holds no memory that tessera.save_memory wrote: {error}") from None


def _fill(modules: Mapping[str, nn.Module], tensors: dict[str, Tensor], path: str) -> None:
    for place, module in modules.items():
        own = module.state_dict()
        found = {name: tensors.pop(f"{place}.{name}", None) for name in own}
        for name, tensor in found.items():
            if tensor is None or tensor.shape != own[name].shape:
                where = "all layers" if place == "shared" else f"layer {place}"
                raise ValueError(f"{path} is damaged: {name!r} of {where} is missing or of another shape")
            if not tensor.isfinite().all():
                raise ValueError(f"{path} is damaged: {name!r} has numbers that are not finite")
        module.load_state_dict(found)
    if tensors:
        raise ValueError(f"{path} is damaged: nothing here is called {min(tensors)!r}")
