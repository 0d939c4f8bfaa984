"""Attaching a Tensor Cache to the attention modules of a transformers causal model."""

from __future__ import annotations

from typing import Any

from torch import nn

from tessera.adapters.attached import AttachedMemory
from tessera.attention import SlidingWindow, enable, restore, unsupported
from tessera.attention.read_masks import share_readings
from tessera.cache.model_config import check_shapes, read_config
from tessera.cache_layers.cache_layer import ATTACHED, ATTENTION
from tessera.tensor_cache.gated_read import MemoryCall, TensorCacheLayer
from tessera.tensor_cache.rotary import phase_of
from tessera.tensor_cache.tensor_cache_config import TensorCacheConfig

#: Attribute of an attention module that holds its memory.
MEMORY = "tensor_cache"
#: The keyword argument by which `MemoryCall` reaches the attention function.
CALL = "memory_call"
#: Attribute of a module without a memory that holds the limits of its attention.
LIMITS = "limits"


def add(model: Any, config: TensorCacheConfig) -> AttachedMemory:
    """Put a Tensor Cache into a model; see `tessera.attach`."""
    why = unsupported(model)
    if why:
        raise ValueError(f"tessera.attach: {type(model).__name__} cannot be given a memory: {why}")
    text, shapes = read_config(model.config)
    check_shapes(model, shapes)
    modules = attention_modules(model, len(shapes))
    # Some decoders have the field without reading it; their attention is causal nevertheless.
    if getattr(text, "is_decoder", None) is False and not all(getattr(module, "is_causal", True) for module in modules):
        raise ValueError(
            f"tessera.attach: {type(model).__name__} cannot be given a memory: is_decoder is False in its config, so its "
            "attention sees later tokens, which a window does not"
        )
    chosen = _chosen(config, [window is None for _, window in shapes])
    heads = text.num_attention_heads
    layers = {}
    for index in chosen:
        (kv_heads, head_dim), _ = shapes[index]
        phase = None if config.rotary else phase_of(model, modules[index], head_dim)
        layers[index] = TensorCacheLayer(config, heads, kv_heads, head_dim, text.hidden_size, phase)
    enabled = text._attn_implementation != ATTENTION
    enable(model)
    done = install(model, config, layers, modules)
    done.enabled = enabled
    for index, (_, window) in enumerate(shapes):
        if window is None and index not in layers:
            # These have the window too, without a memory.
            done.limited.append((modules[index], getattr(modules[index], LIMITS, None)))
            setattr(modules[index], LIMITS, SlidingWindow(config.window, config.sink))
    return done


def remove(model: nn.Module, done: AttachedMemory) -> None:
    """Remove the memory from a model, except for its hooks."""
    for module in model.modules():
        if isinstance(getattr(module, MEMORY, None), TensorCacheLayer):
            delattr(module, MEMORY)
    for module, before in done.limited:
        if before is None:
            delattr(module, LIMITS)
        else:
            setattr(module, LIMITS, before)
    if done.enabled:
        restore(model)


def install(
    model: nn.Module, config: TensorCacheConfig, layers: dict[int, TensorCacheLayer], modules: list[nn.Module]
) -> AttachedMemory:
    """Put memories into a model's attention modules; both are given by layer."""
    done = AttachedMemory(config, shape_of(model), dict(layers))
    for index, layer in layers.items():
        setattr(modules[index], MEMORY, layer)
        done.hooks.append(modules[index].register_forward_pre_hook(_begin, with_kwargs=True))
        done.hooks.append(modules[index].register_forward_hook(_add, with_kwargs=True))
    whole: Any = model
    done.hooks += share_readings(whole.get_decoder() if hasattr(whole, "get_decoder") else whole)
    setattr(model, ATTACHED, done)
    return done


def shape_of(model: Any) -> dict[str, Any]:
    """Return the sizes of a model that a memory depends on."""
    text, layers = read_config(model.config)
    return {
        "type": text.model_type,
        "hidden": text.hidden_size,
        "heads": text.num_attention_heads,
        "layers": [[*shape, window] for shape, window in layers],
    }


def attention_modules(model: nn.Module, count: int) -> list[nn.Module]:
    """Find the attention modules of the decoder, by layer.

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
    """Choose the layers that get a memory: those without a window of their own, outside which nothing is seen."""
    if config.layers is None:
        chosen = [i for i, sees_all in enumerate(whole) if sees_all]
        if not chosen:
            raise ValueError("every layer of this model has a sliding window of its own; nothing is left for a memory")
        return chosen
    count = len(whole)
    wrong = [i for i in config.layers if not -count <= i < count]
    if wrong:
        raise ValueError(f"layers names {wrong[0]}, but the model has {count} layers")
    sliding = [i for i in config.layers if not whole[i]]
    if sliding:
        raise ValueError(f"layers names {sliding[0]}, which has a sliding window of its own; a memory could give nothing back")
    return sorted({i % count for i in config.layers})


def _begin(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Hook before an attention module: pass the state of the call along with it."""
    used = getattr(getattr(module, "config", None), "_attn_implementation", ATTENTION)
    if used != ATTENTION:
        raise RuntimeError(
            f"the attention of this model was switched to {used!r}, which knows no Tensor Cache; tessera.enable(model) "
            "switches it back, tessera.detach(model) takes the memory away"
        )
    call = MemoryCall(getattr(module, MEMORY), kwargs.get("position_ids"), kwargs.get("past_key_values"), int(module.layer_idx))
    return args, {**kwargs, CALL: call}


def _add(_: nn.Module, __: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Hook after an attention module: add the memory's contribution."""
    call: MemoryCall = kwargs[CALL]
    if not call.taken:
        raise RuntimeError(
            "the attention of this model does not hand its keyword arguments on to transformers' AttentionInterface, so its "
            "Tensor Cache was not read; take it away with tessera.detach(model)"
        )
    added = call.added
    if added is None:
        return output
    if isinstance(output, tuple):
        return (output[0] + added.to(output[0].dtype), *output[1:])
    return output + added.to(output.dtype)
