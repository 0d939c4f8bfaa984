"""The device and the weights of a module, also when accelerate keeps the weights elsewhere between calls.

`device_map` and `cpu_offload` of accelerate leave parameters on the device "meta" and hooks on the modules, each with the
device that the weights are brought to for a call and, where they are offloaded, a table of the weights themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def device_of(module: nn.Module) -> torch.device | None:
    """Return the device that a module computes on: that of accelerate's first hook, else that of its first weight.

    None: all its weights are on "meta" without a hook that loads them, or it has none.
    """
    for part in module.modules():
        for hook in _hooks(part):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            if not tensor.is_meta:
                return tensor.device
    return None


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to a device, without waiting for the device; one that is elsewhere is moved there."""
    if values.device.type == "cpu" and device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=values.device.type == "cpu")


def layer_devices(model: Any, count: int) -> list[torch.device | None]:
    """Return the device on which each of `count` layers of a decoder computes, see `device_of`; else the model's device."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    found: dict[int, torch.device] = {}
    for module in decoder.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and index not in found:
            device = device_of(module)
            if device is not None:
                found[index] = device
    rest = device_of(model)
    return [found.get(index, rest) for index in range(count)]


def weights(model: nn.Module) -> Iterator[tuple[str, Tensor, nn.Parameter]]:
    """Yield every weight of a model: its name, its value, and the parameter itself, which may be on "meta"; tied ones once."""
    known: set[int] = set()
    for place, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            tensor = parameter.detach()
            if parameter.is_meta:
                tables = (getattr(hook, "weights_map", None) for hook in _hooks(module))
                found = next((t[name] for t in tables if isinstance(t, Mapping) and name in t), None)
                tensor = tensor if found is None else found.detach()
            # Offloaded tied weights are separate parameters that share memory.
            same = id(parameter) if tensor.is_meta or not tensor.numel() else hash((tensor.data_ptr(), tensor.shape))
            if same not in known:
                known.add(same)
                yield f"{place}.{name}" if place else name, tensor, parameter


def _hooks(module: nn.Module) -> list[Any]:
    """Return the hooks of accelerate, one or several in sequence."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", (hook,)))
