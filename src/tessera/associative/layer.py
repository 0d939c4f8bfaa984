"""What a Tensor Cache adds to one attention module: the memory, a gate, and a projection into the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tessera.associative.config import TensorCacheConfig
from tessera.associative.memory import TensorCache
from tessera.associative.rotary import Phase
from tessera.associative.state import TensorCacheState
from tessera.modules import Float32Module


def is_gate(name: str) -> bool:
    """Whether a parameter of this name opens, closes or paces a memory: those learn faster than weights and never decay."""
    last = name.rpartition(".")[2]
    return last.endswith("_logit") or last in ("gate_weight", "rate_weight", "slow_share")


class TensorCacheLayer(Float32Module):
    """y = W_o local + sigmoid(gate) · W_tc heads(read); W_tc starts at zero, so that at first nothing changes.

    Args:
        config: see `TensorCacheConfig`.
        heads: query heads.
        kv_heads: key heads.
        head_dim: of queries, keys and values.
        hidden: width of the residual stream.
        phase: how to take off the rotary phase; None: it stays on.

    Parameters: those of `TensorCache`; `gate_logit` (), started at `config.gate_init`; with gate "token" also `gate_weight`
    (heads · head_dim,), zero at the start; `out` (hidden, heads · head_dim), zero at the start.
    """

    def __init__(
        self, config: TensorCacheConfig, heads: int, kv_heads: int, head_dim: int, hidden: int, phase: Phase | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.memory = TensorCache(config, kv_heads, head_dim)
        self.gate_logit = nn.Parameter(torch.tensor(config.gate_init, dtype=torch.float32))
        if config.gate == "token":
            self.gate_weight = nn.Parameter(torch.zeros(heads * head_dim, dtype=torch.float32))
        self.out = nn.Linear(heads * head_dim, hidden, bias=False, dtype=torch.float32)
        nn.init.zeros_(self.out.weight)
        # In a tuple, so that the model's module is not taken for a part of this one.
        self._phase = (phase,)
        #: What the attention function leaves for the hook behind the module: (batch, tokens, hidden).
        self.pending: Tensor | None = None
        #: Off: reads count for nothing, to measure what the memory is worth.
        self.reads = True

    def plain(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x` as the memory wants it: without its rotary phase unless `config.rotary`."""
        phase = self._phase[0]
        return x if phase is None else phase.remove(x, positions)

    def project(self, read: Tensor, query: Tensor) -> Tensor:
        """What is added to the output of the attention module.

        Args:
            read: (batch, heads, tokens, head_dim).
            query: likewise; a gate per token is computed from it.

        Returns:
            (batch, tokens, hidden).
        """
        # What was added is kept in float32, whatever the model's dtype.
        flat = read.transpose(1, 2).flatten(2).to(self.out.weight.dtype)
        gate: Tensor = self.gate_logit
        if self.config.gate == "token":
            gate = gate + query.transpose(1, 2).flatten(2).to(self.gate_weight.dtype) @ self.gate_weight
            gate = gate.unsqueeze(-1)
        added = (torch.sigmoid(gate).to(flat.dtype) * self.out(flat)).to(read.dtype)
        return added if self.reads else added * 0

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, real: Tensor, positions: Tensor, state: TensorCacheState | None = None
    ) -> tuple[Tensor, TensorCacheState]:
        """The contribution of whole sequences, or of the next part of them.

        Args:
            q: (batch, heads, n, head_dim) of the newest n tokens.
            k, v: (batch, kv_heads, tokens >= n, head_dim).
            real: (batch, tokens) bool, False for padding.
            positions: (batch or 1, tokens) int64, the rotary positions.
            state: what was before; None: the sequences begin.

        Returns:
            (batch, n, hidden), and the new state.
        """
        n, past = q.shape[2], k.shape[2] - q.shape[2]
        k = self.plain(k, positions)
        query = self.plain(q, positions[:, past:])
        if past:
            nothing = k.new_zeros((k.shape[0], k.shape[1], past, k.shape[3]))
            _, state = self.memory(nothing, k[:, :, :past], v[:, :, :past], state, real[:, :past])
        read, state = self.memory(query, k[:, :, past:], v[:, :, past:], state, real[:, past : past + n])
        return self.project(read, query), state
