"""Removal of the rotary phase from keys and queries, so that a memory finds content independently of its position."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from tessera.devices import device_of
from tessera.kernels.precision import join


class Phase:
    """The rotary embedding of one layer of a transformers model, inverted.

    Args:
        rotary: the model's module that gives (cos, sin) for positions.
        kind: the layer's type, for models whose rotary module asks for it.
    """

    def __init__(self, rotary: nn.Module, kind: str | None) -> None:
        self._rotary = rotary
        wants_kind = "layer_type" in inspect.signature(rotary.forward).parameters
        self._extra: dict[str, Any] = {"layer_type": kind} if wants_kind else {}

    def tables(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin of positions (batch or 1, tokens), each (batch or 1, 1, tokens, rotated channels) float32."""
        cos, sin = self._rotary(like.new_zeros(1, dtype=torch.float32), positions, **self._extra)
        return cos.unsqueeze(1).float(), sin.unsqueeze(1).float()

    def remove(self, x: Tensor, positions: Tensor) -> Tensor:
        """Undo the rotation of x. x: (batch, heads, tokens, head_dim); positions: (batch or 1, tokens)."""
        cos, sin = self.tables(positions, x)
        mixed, rest = x[..., : cos.shape[-1]].float(), x[..., cos.shape[-1] :]
        first, second = mixed.chunk(2, dim=-1)
        # Some models scale the rotation; cos² + sin² is the square of that.
        back = (mixed * cos - torch.cat((-second, first), dim=-1) * sin) / (cos.square() + sin.square())
        return join((back.to(x.dtype), rest), -1)


def phase_of(model: Any, attention: nn.Module, head_dim: int) -> Phase:
    """Return the phase of an attention module of `model`, checked against the model's own rotation.

    Raises:
        ValueError: if the model rotates in a way that is not known here.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    rotary = getattr(decoder, "rotary_emb", None)
    rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    why = "it has no rotary_emb" if rotary is None else "its rotation is written in a way that is not known here"
    several = bool(getattr(rotary, "mrope_section", None))
    if several:
        why = "its tokens have several positions each, of time, height and width"
    if rotary is not None and rotate is not None and not several:
        types = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
        index = getattr(attention, "layer_idx", None)
        phase = Phase(rotary, None if types is None or index is None else types[index])
        positions = torch.arange(3, 7)[None]
        device = device_of(rotary) or device_of(attention) or torch.device("cpu")
        x = torch.randn(1, 1, 4, head_dim, dtype=torch.float32, device=device)
        try:
            cos, sin = phase.tables(positions.to(device), x)
            own = x if cos.shape[-1] <= head_dim else x[..., :0]
            mixed = rotate(own, own, cos.squeeze(1), sin.squeeze(1))[0]
            if torch.allclose(phase.remove(mixed, positions.to(device)), x, atol=1e-4):
                return phase
        except (RuntimeError, TypeError, ValueError, LookupError):
            pass
    raise ValueError(
        f"the rotary phase of {type(model).__name__} cannot be taken off: {why}. Use TensorCacheConfig(rotary=True), which "
        "leaves it on"
    )
