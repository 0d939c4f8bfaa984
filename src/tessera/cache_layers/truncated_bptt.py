"""The state that a bounded model keeps from one segment of a document to the next in training.

`tessera.Cache` keeps no gradients. A `TruncatedBPTTCache` does: pass it to consecutive calls and they compute, forward and
backward, what one call on the whole sequence would; detach it in between and gradients stop there (truncated backpropagation
through time), so that only one segment's activations are kept at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache as TransformersCache
from transformers.cache_utils import CacheLayerMixin

from tessera.cache_layers.layer_states import LayerStates
from tessera.tensor_cache import TensorCacheState
from tessera.tensor_cache.infini import InfiniState


@dataclass(frozen=True, eq=False)
class Segment:
    """A placeholder for the new keys, or values, of a layer, which Tessera's attention function reads.

    Attributes:
        layer: what the layer keeps.
        new: (batch, kv_heads, tokens, head_dim).
    """

    layer: TruncatedBPTTLayer
    new: Tensor


class TruncatedBPTTLayer(CacheLayerMixin):
    """The kept state of one layer.

    Attributes:
        seen: tokens so far.
        k, v: (batch, kv_heads, n, head_dim), the sinks and, behind them, the newest tokens that a later query sees; None: the
            document begins, or the layer keeps no such tokens.
        memory: state of a Tensor Cache, the pairs in its window included, or None.
        infini: state of Infini-attention, or None.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.memory_states = LayerStates()
        self.seen = 0
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.memory: TensorCacheState | None = None
        self.infini: InfiniState | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: no size has to be known beforehand."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Pass new keys and values, (batch, kv_heads, tokens, head_dim), on to the attention function."""
        return Segment(self, key_states), Segment(self, value_states)

    def get_seq_length(self) -> int:
        """Tokens seen, from which positions are counted."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the size of the new tokens alone; visibility of kept tokens follows the window and sinks."""
        return query_length, self.seen

    def get_max_length(self) -> int:
        """Return -1: there may be any number of tokens."""
        return -1

    def joined(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the kept keys and values, followed by the new ones."""
        if self.k is None or self.v is None:
            return k, v
        return torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)

    def keep(self, k: Tensor, v: Tensor, sink: int, window: int) -> None:
        """Keep what later queries see of `joined` keys and values: the first `sink` tokens and the newest `window` - 1."""
        sink = min(sink, k.shape[2])
        newest = max(sink, k.shape[2] - window + 1)
        self.k, self.v = (torch.cat((x[:, :, :sink], x[:, :, newest:]), dim=2) for x in (k, v))

    def detach(self) -> None:
        """Cut the graph."""
        self.k, self.v = (None if x is None else x.detach() for x in (self.k, self.v))
        self.memory = None if self.memory is None else self.memory.detach()
        self.infini = None if self.infini is None else self.infini.detach()
        self.memory_states.detach()


class TruncatedBPTTCache(TransformersCache):
    """The state of whole batch rows without padding, for ``model(input_ids=segment, past_key_values=cache)``.

    Args:
        model: a `tessera.models.gpt.GPT`, or a model with a memory attached; every layer must have a bounded state.

    Raises:
        ValueError: for a model of which a layer sees all tokens, so that what would be kept grows without bound.
    """

    layers: list[TruncatedBPTTLayer]

    def __init__(self, model: nn.Module) -> None:
        found = [m for m in model.modules() if hasattr(m, "layer_idx") and type(m).__name__.endswith("Attention")]
        bounded = [any(getattr(m, name, None) is not None for name in ("tensor_cache", "infini", "limits")) for m in found]
        if not found or not all(bounded):
            which = f"layer {bounded.index(False)} of it sees" if found else "its layers see"
            raise ValueError(
                f"{type(model).__name__} has no bounded state to keep from segment to segment: {which} every token. Choose "
                "attention with a window, such as 'window:256' or 'window:256 + tc', or 'infini:64'"
            )
        super().__init__(layers=[TruncatedBPTTLayer() for _ in found])

    def detach(self) -> TruncatedBPTTCache:
        """Stop gradients here, and return this cache."""
        for layer in self.layers:
            layer.detach()
        return self
