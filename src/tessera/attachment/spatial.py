"""A Tensor Memory between attention and MLP of the layers of a model.

A layer computes x + mlp(norm(x)) from x, the residual stream behind its attention. With a memory it computes
y + mlp(norm(y)) with y = x + sigmoid(gate) · memory(LayerNorm(x)): one hook gives y to the norm, another adds the difference
to what the layer returns. Layers that do not have this form are refused.

In a causal model every layer has its own state, which stays with the cache (`tessera.attachment.streams`). In a model that
sees everything at once a layer goes on with the state of the layer before, unless `threaded` is False, and nothing stays.
"""

from __future__ import annotations

import inspect
import uuid
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.cache_utils import Cache as TransformersCache

from tessera.attachment.probe import check_form
from tessera.attachment.record import Attachment
from tessera.attachment.streams import Stream, streams_of
from tessera.cache.layer import ATTACHED
from tessera.spatial.config import TensorMemoryConfig
from tessera.spatial.layer import TensorMemoryLayer, make_layers, make_memory
from tessera.spatial.memory import TensorMemory
from tessera.spatial.state import TensorMemoryState

#: Where a model keeps its memory.
MEMORY = "tensor_memory"

#: What families call the norm between attention and MLP. Where a layer has two of them, the first is the one.
NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm", "layernorm_after", "final_layer_norm", "ln_2", "norm2")


class Target(NamedTuple):
    """Where a memory can be put into a model."""

    kind: str
    """Of the model."""
    causal: bool
    """Whether no output may depend on a later token."""
    dim: int
    """Width of the residual stream."""
    owner: nn.Module
    """What calls the layers."""
    layers: list[nn.Module]
    """In the order in which they run."""
    norms: list[nn.Module]
    """Between attention and MLP of each."""


class Plug:
    """What the hooks of a model share.

    Args:
        target: see `Target`.
        memory, layers: what is added.
        threaded: see `TensorMemoryConfig`.
    """

    def __init__(
        self, target: Target, memory: TensorMemory, layers: dict[int, TensorMemoryLayer], threaded: bool, added: list[Any]
    ) -> None:
        self.memory, self.layers = memory, layers
        self.causal, self.threaded = target.causal, threaded
        self.owner = uuid.uuid4().hex
        self.mask: Tensor | None = None
        self.real: tuple[int, Tensor | None] | None = None
        self.cache: TransformersCache | None = None
        self.pending: Tensor | None = None
        self.state: TensorMemoryState | None = None
        self.after = -1
        if target.causal:
            named = inspect.signature(target.owner.forward)
            added.append(target.owner.register_forward_pre_hook(partial(self.begin, named), with_kwargs=True))
        else:
            added.append(target.layers[0].register_forward_pre_hook(self.begin_anew))
        for index in layers:
            layer = target.layers[index]
            added.append(layer.register_forward_pre_hook(self.enter, with_kwargs=True))
            added.append(target.norms[index].register_forward_pre_hook(partial(self.add, index)))
            added.append(layer.register_forward_hook(self.leave))

    def begin(self, named: inspect.Signature, _: nn.Module, args: Any, kwargs: Any) -> None:
        """A causal model is called: note its mask, which layers get in another form."""
        given = named.bind_partial(*args, **kwargs).arguments
        embeds = given.get("inputs_embeds")
        if isinstance(embeds, Tensor) and not embeds.isfinite().all():
            raise ValueError("inputs_embeds must be finite; a memory that has absorbed NaN or infinity never recovers")
        self.mask, self.real = given.get("attention_mask"), None
        if self.mask is not None and not (isinstance(self.mask, Tensor) and self.mask.ndim == 2):
            raise ValueError(
                "with a Tensor Memory the attention mask must be (batch, tokens), which says what is padding; got "
                f"{tuple(self.mask.shape) if isinstance(self.mask, Tensor) else type(self.mask).__name__}"
            )

    def begin_anew(self, *_: Any) -> None:
        """An encoder is called."""
        self.state, self.after = None, -1

    def enter(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        """A layer with a memory is called: note its cache."""
        if layer.training and getattr(layer, "gradient_checkpointing", False):
            raise ValueError(
                "a Tensor Memory and gradient checkpointing do not go together: layers run again without their state"
            )
        self.cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, TransformersCache)), None)

    def add(self, index: int, _: nn.Module, args: Any) -> Any:
        """x comes to the norm: let it see x and what the memory adds."""
        x: Tensor = args[0]
        layer = self.layers[index]

        def run(part: Tensor, state: TensorMemoryState | None) -> tuple[Tensor, TensorMemoryState]:
            return layer(self.memory, part, state)

        if not self.causal:
            self.pending = self._threaded(index, layer, x)
        elif self.cache is None:
            self.pending = Stream(len(x)).advance(run, x, self._padding(x))
        else:
            cache, self.cache = self.cache, None
            stream = streams_of(cache, self.owner).layer(index, len(x), int(cache.get_seq_length(index)) - x.shape[1])
            self.pending = stream.advance(run, x, self._padding(x))
        return (x + self.pending, *args[1:])

    def leave(self, _: nn.Module, __: Any, output: Any) -> Any:
        """A layer returns what it computed from y, on x."""
        added, self.pending = self.pending, None
        if added is None:
            return output
        if isinstance(output, tuple):
            return (output[0] + added, *output[1:])
        return output + added

    def _threaded(self, index: int, layer: TensorMemoryLayer, x: Tensor) -> Tensor:
        if self.after >= index:
            raise ValueError(
                f"layer {index} ran again after layer {self.after}; gradient checkpointing cannot be used with a memory"
            )
        added, state = layer(self.memory, x, self.state if self.threaded else None)
        self.after = index
        self.state = self.memory.flush(state) if self.threaded and index != max(self.layers) else None
        return added

    def _padding(self, x: Tensor) -> Tensor | None:
        """Which of the newest tokens are real, (batch, tokens) on the CPU; None: all."""
        if self.mask is None:
            return None
        if self.real is None or self.real[0] != x.shape[1]:
            if self.mask.shape[0] != x.shape[0] or self.mask.shape[1] < x.shape[1]:
                raise ValueError(
                    f"the attention mask {tuple(self.mask.shape)} does not fit {x.shape[1]} tokens of {len(x)} rows"
                )
            real = self.mask[:, -x.shape[1] :].bool().cpu()
            self.real = x.shape[1], None if bool(real.all()) else real
        return self.real[1]


def add(model: nn.Module, config: TensorMemoryConfig) -> Attachment:
    """Put a Tensor Memory into a model; see `tessera.attach`."""
    target = find(model)
    if target.causal and config.threaded:
        raise ValueError(
            f"threaded=True hands the state from layer to layer, so {target.kind}, a causal model, would see later tokens; "
            "leave threaded out"
        )
    if config.anchored:
        raise ValueError("anchored=True needs the place of every token, which an attached memory is not told")
    layers = make_layers(config, target.dim, len(target.layers))
    check_form(model, target.layers[min(layers)], target.norms[min(layers)], target.causal)
    done = Attachment(config, shape_of(model), dict(layers), make_memory(config, target.dim))
    threaded = not target.causal if config.threaded is None else config.threaded
    assert isinstance(done.shared, TensorMemory)
    Plug(target, done.shared, layers, threaded, done.hooks)
    setattr(model, MEMORY, nn.ModuleDict({"shared": done.shared, **{str(index): layer for index, layer in layers.items()}}))
    setattr(model, ATTACHED, done)
    return done


def remove(model: nn.Module, _: Attachment) -> None:
    """Take it out again, but for its hooks."""
    delattr(model, MEMORY)


def shape_of(model: nn.Module) -> dict[str, Any]:
    """What a memory must know of its model."""
    target = find(model)
    return {"type": target.kind, "hidden": target.dim, "layers": len(target.layers)}


def find(model: Any) -> Target:
    """Where in a model a memory can be.

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
    return Target(text.model_type, causal, text.hidden_size, owner, layers, norms)
