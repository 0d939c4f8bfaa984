"""Attaching a Tensor Memory between attention and MLP of the layers of a model.

A layer computes x + mlp(norm(x)) from x, the residual stream behind its attention. With a memory it computes
y + mlp(norm(y)) with y = x + sigmoid(gate) · memory(LayerNorm(x)): one hook gives y to the norm, another adds the difference
to what the layer returns (`tessera.adapters.hooks`). Layers that do not have this form are refused.

In a causal model every layer has its own state, which stays with the cache (`tessera.adapters.streams`). In a non-causal model
a layer continues the state of the layer before, unless `threaded` is False, and no state is kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from tessera.adapters.attached import AttachedMemory
from tessera.adapters.hooks import MemoryHooks
from tessera.adapters.probe import check_form
from tessera.cache_layers.cache_layer import ATTACHED
from tessera.tensor_memory.gated_layer import make_layers, make_memory
from tessera.tensor_memory.tensor_memory import TensorMemory
from tessera.tensor_memory.tensor_memory_config import TensorMemoryConfig

#: Attribute of a model that holds its memory.
MEMORY = "tensor_memory"

#: Names of the norm between attention and MLP in different families. Where a layer has two of them, the first is used.
NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm", "layernorm_after", "final_layer_norm", "ln_2", "norm2")


class Target(NamedTuple):
    """The place in a model where a memory can be attached."""

    kind: str
    """The model's configuration."""
    causal: bool
    """Whether the model is causal: no output may depend on a later token."""
    dim: int
    """Width of the residual stream."""
    owner: nn.Module
    """The module that calls the layers."""
    layers: list[nn.Module]
    """The layers, in the order in which they run."""
    norms: list[nn.Module]
    """The norm between attention and MLP of each layer."""
    window: int | None = None
    """Window of the model's sliding layers in tokens, or None."""


def add(model: nn.Module, config: TensorMemoryConfig) -> AttachedMemory:
    """Put a Tensor Memory into a model; see `tessera.attach`."""
    target = find(model)
    if target.causal and config.threaded:
        raise ValueError(
            f"threaded=True hands the state from layer to layer, so {target.kind}, a causal model, would see later tokens; "
            "leave threaded out"
        )
    if config.anchored:
        raise ValueError("anchored=True needs the place of every token, which an attached memory does not receive")
    layers = make_layers(config, target.dim, len(target.layers))
    check_form(model, target.layers[min(layers)], target.norms[min(layers)], target.causal)
    done = AttachedMemory(config, shape_of(model), dict(layers), make_memory(config, target.dim))
    threaded = not target.causal if config.threaded is None else config.threaded
    assert isinstance(done.shared, TensorMemory)
    place = (target.owner, target.layers, target.norms, target.causal, target.window)
    hooks = MemoryHooks(*place, done.shared, layers, threaded)
    done.hooks += hooks.registered
    done.owner = hooks.name
    setattr(model, MEMORY, nn.ModuleDict({"shared": done.shared, **{str(index): layer for index, layer in layers.items()}}))
    setattr(model, ATTACHED, done)
    return done


def remove(model: nn.Module, _: AttachedMemory) -> None:
    """Remove the memory from a model, except for its hooks."""
    delattr(model, MEMORY)


def shape_of(model: nn.Module) -> dict[str, Any]:
    """Return the sizes of a model that a memory depends on."""
    target = find(model)
    return {"type": target.kind, "hidden": target.dim, "layers": len(target.layers)}


def find(model: Any) -> Target:
    """Find the place in a model where a memory can be attached.

    Raises:
        ValueError: if nowhere, saying why.
    """
    name = type(model).__name__
    if type(model).__module__.startswith("timm."):
        if not hasattr(model, "blocks") or not all(type(block).__name__ == "Block" for block in model.blocks):
            raise ValueError(
                f"tessera.attach: {name} is no plain ViT of timm, whose blocks run one after the other on all tokens"
            )
        if getattr(model, "grad_checkpointing", False):
            raise ValueError("a Tensor Memory and gradient checkpointing do not go together; switch it off first")
        return Target(
            f"timm/{name}", False, model.embed_dim, model, list(model.blocks), [block.norm2 for block in model.blocks]
        )
    if not hasattr(model, "base_model") or not hasattr(model, "config"):
        raise ValueError(f"tessera.attach: {name} is neither a model of transformers nor a ViT of timm")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"tessera.attach: {name} is an encoder-decoder; a Tensor Memory is for one stack of layers")
    causal = bool(model.can_generate())
    if not causal and not str(model.main_input_name).startswith("pixel_values"):
        raise ValueError(
            f"tessera.attach: {name} is neither a causal language model, which ends in ...ForCausalLM, nor an encoder of images"
        )
    text = model.config.get_text_config(decoder=True) if causal else model.config
    other = sorted(set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if other:
        raise ValueError(f"tessera.attach: {name} has layers of type {', '.join(map(repr, other))}, which count no tokens")
    found = []
    for place, module in model.base_model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) != text.num_hidden_layers:
            continue
        known = (next((getattr(layer, norm) for norm in NORMS if hasattr(layer, norm)), None) for layer in module)
        norms = [norm for norm in known if isinstance(norm, nn.Module)]
        if len(norms) == len(module):
            found.append((model.base_model.get_submodule(place.rpartition(".")[0]), list(module), norms))
    if len(found) != 1:
        raise ValueError(
            f"tessera.attach: {name} has {len(found)} stacks of {text.num_hidden_layers} layers with "
            f"a norm between attention and MLP (known names: {', '.join(NORMS)}); a memory needs exactly one"
        )
    owner, layers, norms = found[0]
    window = getattr(text, "sliding_window", None)
    return Target(text.model_type, causal, text.hidden_size, owner, layers, norms, window if isinstance(window, int) else None)
