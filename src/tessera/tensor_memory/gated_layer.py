"""The modules that a Tensor Memory adds to a model: one memory for all layers, and a norm and a gate for each."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from tessera.finite import FiniteCheck
from tessera.modules import Float32Module
from tessera.tensor_memory.tensor_memory import TensorMemory
from tessera.tensor_memory.tensor_memory_config import TensorMemoryConfig
from tessera.tensor_memory.tensor_memory_state import TensorMemoryState


class TensorMemoryLayer(Float32Module):
    """The part of one layer: LayerNorm before the memory, sigmoid(gate) after it.

    Args:
        config: see `TensorMemoryConfig`.
        dim: width of the residual stream.

    Parameters: `norm`, one and zero at the start as `torch.nn.LayerNorm`'s; `gate_logit` (), started at `config.gate_init`, the
    paper's -2, or at 0 where that is None, which is ours.
    """

    def __init__(self, config: TensorMemoryConfig, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, dtype=torch.float32)
        self.gate_logit = nn.Parameter(torch.tensor(float(config.gate_init or 0), dtype=torch.float32))
        #: If False, reads have no effect, to measure what the memory contributes.
        self.reads = True

    def forward(
        self,
        memory: TensorMemory,
        x: Tensor,
        state: TensorMemoryState | None,
        places: Tensor | None = None,
        finite: FiniteCheck | None = None,
    ) -> tuple[Tensor, TensorMemoryState]:
        """Compute the addition to the residual stream.

        Args:
            memory: the memory that all layers share.
            x: (batch, tokens, dim).
            state: this layer's own state, or, in a non-causal model, that of the layer before.
            places: the tokens' places, for a memory that is anchored; see `TensorMemory.forward`.
            finite: see `TensorMemory.forward`.

        Returns:
            (batch, tokens, dim) in the dtype of `x`, and the new state.
        """
        norm = self.norm
        normed = layer_norm(x.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)
        # In a model spread over several devices the memory of all layers, and its states, stay on one of them.
        home = memory.device
        read, state = memory(normed.to(home), state, None if places is None else places.to(home), finite=finite)
        added = torch.sigmoid(self.gate_logit.float()) * read.to(x.device)
        return (added if self.reads else added * 0).to(x.dtype), state


def make_memory(config: TensorMemoryConfig, dim: int) -> TensorMemory:
    """Make the memory of all layers; with `config.gate_init` None its output is zero at the start."""
    memory = TensorMemory(config, dim)
    if config.gate_init is None:
        nn.init.zeros_(memory.out_proj.weight)
        nn.init.zeros_(memory.out_proj.bias)
    return memory


def make_layers(config: TensorMemoryConfig, dim: int, count: int) -> dict[int, TensorMemoryLayer]:
    """Make the parts of the layers with a memory, every `config.every`-th of `count` layers, by index.

    Raises:
        ValueError: if there is none.
    """
    chosen: Iterable[int] = range(config.every - 1, count, config.every)
    if not chosen:
        raise ValueError(f"every={config.every} leaves no layer for a memory in a model of {count}")
    return {index: TensorMemoryLayer(config, dim) for index in chosen}
