"""A check that a layer of a model has the form that a Tensor Memory between its attention and its MLP needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from tessera.devices import device_of

#: Input for a causal model: rows that differ in their last token.
ROWS_TOKENS = (2, 3)


def check_form(model: Any, layer: nn.Module, norm: nn.Module, causal: bool) -> None:
    """Run the model once, on two rows of tokens or an image of noise, and check that the layer returns x + f(norm(x)).

    Args:
        model: see `tessera.attach`.
        layer: layer of the model.
        norm: norm of the layer whose input should be the residual stream behind the attention, x.
        causal: whether the model reads tokens or images.

    Raises:
        ValueError: for a layer of another form, which the message names.
    """
    seen: dict[str, Tensor] = {}
    parts: list[Tensor] = []

    def note(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        seen[name] = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        parts.append(output[0] if isinstance(output, tuple) else output)

    def finish(_: nn.Module, __: Any, output: Any) -> None:
        seen["out"] = output[0] if isinstance(output, tuple) else output

    hooks = [
        layer.register_forward_pre_hook(lambda *a: note("in", *a), with_kwargs=True),
        norm.register_forward_pre_hook(lambda *a: note("x", *a), with_kwargs=True),
        layer.register_forward_hook(finish),
        *(child.register_forward_hook(keep) for child in layer.children()),
    ]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            _call(model, causal)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    name, x = type(layer).__name__, seen.get("x")
    if x is None or "out" not in seen:
        raise ValueError(f"tessera.attach: {name} did not use its norm between attention and MLP")
    if causal and tuple(x.shape[:2]) != ROWS_TOKENS:
        raise ValueError(
            f"tessera.attach: {name} gives its norm {tuple(x.shape)} for {ROWS_TOKENS[0]} rows of {ROWS_TOKENS[1]} tokens, so "
            "a memory could not tell the rows apart"
        )
    if causal and not torch.allclose(x[0, :-1].float(), x[1, :-1].float(), rtol=1e-2, atol=1e-3):
        raise ValueError(f"tessera.attach: in {name} tokens see later ones, but a Tensor Memory reads one after the other")
    if x is seen["in"]:
        raise ValueError(f"tessera.attach: {name} computes attention and MLP side by side; there is nothing between them")
    if any(x is part for part in parts):
        raise ValueError(
            f"tessera.attach: {name} has norms behind its attention, not before its MLP, where a memory would read"
        )
    same = [part.float() for part in parts if part.shape == x.shape]
    out, before = seen["out"].float(), x.float()
    # Some layers add x in their last submodule, some scale what they add.
    within = any(torch.equal(part, out) for part in same)
    scaled = any(cosine_similarity((out - before).flatten(), part.flatten(), dim=0) > 0.99 for part in same)
    # Numbers that a layer scale makes small are lost when the sum is rounded.
    rounding = 4 * torch.finfo(x.dtype).eps * before.abs().max()
    added = any((before + part - out).abs().max() <= rounding for part in same)
    if not (within or scaled or added):
        raise ValueError(
            f"tessera.attach: {name} does not return x + mlp(norm(x)), so nothing can be added to x behind attention"
        )


def _call(model: Any, causal: bool) -> None:
    dtype, device = next(p.dtype for p in model.parameters() if p.is_floating_point()), device_of(model)
    if causal:
        model(input_ids=torch.tensor([[0, 1, 0], [0, 1, 1]], device=device), use_cache=False)
        return
    if type(model).__module__.startswith("timm."):
        size = getattr(model.patch_embed, "img_size", None) or (4 * side for side in model.patch_embed.patch_size)
        shape, call = (model.patch_embed.proj.in_channels, *size), model
    else:
        config = model.config
        sides = config.image_size if isinstance(config.image_size, list | tuple) else (config.image_size, config.image_size)
        shape, call = (config.num_channels, *sides), model.base_model
        if hasattr(config, "num_frames"):
            shape = (config.num_frames, *shape)
    call(torch.randn(1, *shape, device=device, dtype=dtype))
