"""The layer that a Tensor Cache adds to one attention module: memory, gate, and projection into the residual stream."""

from __future__ import annotations

import uuid
from typing import Any

import torch
from torch import Tensor, nn

from tessera.finite import FiniteCheck
from tessera.modules import Float32Module
from tessera.tensor_cache.rotary import Phase
from tessera.tensor_cache.tensor_cache import TensorCache
from tessera.tensor_cache.tensor_cache_config import TensorCacheConfig
from tessera.tensor_cache.tensor_cache_state import TensorCacheState


def is_gate(name: str) -> bool:
    """Whether this is the name of a gate, decay or write rate, which learn faster than weights, without weight decay."""
    last = name.rpartition(".")[2]
    return last.endswith("_logit") or last in ("gate_weight", "rate_weight", "slow_share")


class TensorCacheLayer(Float32Module):
    """y = W_o local + sigmoid(gate) · W_tc heads(read); W_tc starts at zero, so that at first nothing changes.

    Args:
        config: see `TensorCacheConfig`.
        heads: query heads.
        kv_heads: key heads.
        head_dim: length of a query, a key and a value.
        hidden: width of the residual stream.
        phase: how to remove the rotary phase; None: it is kept.

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
        # In a tuple, so that the model's module is not registered as a submodule of this one.
        self._phase = (phase,)
        #: If False, reads have no effect, to measure what the memory contributes.
        self.reads = True
        #: Identifier by which caches know the memory whose state they hold.
        self.name = uuid.uuid4().hex

    @property
    def unrotates(self) -> bool:
        """Whether it needs the rotary positions of its inputs."""
        return self._phase[0] is not None

    def unrotated(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """Return `x` without its rotary phase, unless `config.rotary`."""
        phase = self._phase[0]
        if phase is None:
            return x
        assert positions is not None
        return phase.remove(x, positions)

    def project(self, read: Tensor, query: Tensor) -> Tensor:
        """Compute the addition to the attention module's output.

        Args:
            read: (batch, heads, tokens, head_dim).
            query: likewise; a gate per token is computed from it.

        Returns:
            (batch, tokens, hidden).
        """
        # The added weights are in float32, whatever the model's dtype.
        flat = read.transpose(1, 2).flatten(2).to(self.out.weight.dtype)
        gate: Tensor = self.gate_logit
        if self.config.gate == "token":
            gate = gate + query.transpose(1, 2).flatten(2).to(self.gate_weight.dtype) @ self.gate_weight
            gate = gate.unsqueeze(-1)
        added = (torch.sigmoid(gate).to(flat.dtype) * self.out(flat)).to(read.dtype)
        return added if self.reads else added * 0

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        real: Tensor,
        positions: Tensor | None,
        state: TensorCacheState | None = None,
        finite: FiniteCheck | None = None,
    ) -> tuple[Tensor, TensorCacheState]:
        """Compute the contribution for whole sequences, or for the next part of them.

        Args:
            q: (batch, heads, n, head_dim) of the newest n tokens.
            k, v: (batch, kv_heads, tokens >= n, head_dim).
            real: (batch, tokens) bool, False for padding before the first token.
            positions: (batch or 1, tokens) int64, the rotary positions; None where `unrotates` is False.
            state: the state after the previous part; None: the sequences begin.
            finite: see `TensorCache.forward`.

        Returns:
            (batch, n, hidden), and the new state.
        """
        n, past = q.shape[2], k.shape[2] - q.shape[2]
        k = self.unrotated(k, positions)
        query = self.unrotated(q, None if positions is None else positions[:, past:])
        if past:
            nothing = k.new_zeros((k.shape[0], k.shape[1], past, k.shape[3]))
            _, state = self.memory(nothing, k[:, :, :past], v[:, :, :past], state, real[:, :past], finite=finite)
        read, state = self.memory(query, k[:, :, past:], v[:, :, past:], state, real[:, past : past + n], finite=finite)
        return self.project(read, query), state


class MemoryCall:
    """One call of an attention module that has a memory.

    Made by the hook before the module, passed on to the attention function as a keyword argument, and read by the hook after
    the module: the state of a call is nowhere else, so that calls may run concurrently.

    Args:
        memory: the module's memory.
        positions: (batch or 1, tokens) int64, rotary positions of the call's tokens, or None.
        cache: the module's cache, or None.
        layer: index of the module's layer.

    Attributes:
        added: what the attention function leaves for the hook behind the module, (batch, tokens, hidden), or None.
        taken: the attention function has been given this.
    """

    def __init__(self, memory: TensorCacheLayer, positions: Any, cache: Any, layer: int) -> None:
        self.memory, self.positions, self.cache, self.layer = memory, positions, cache, layer
        self.added: Tensor | None = None
        self.taken = False

    def positions_of(self, query: Tensor) -> Tensor | None:
        """Positions (batch or 1, tokens) of the queries (batch, heads, tokens, head_dim); None where nobody needs them.

        Raises:
            ValueError: if the model gave none, or several for each token.
        """
        if not self.memory.unrotates:
            return None
        found = self.positions
        if not isinstance(found, Tensor) or found.ndim != 2 or found.shape[1] != query.shape[2]:
            got = tuple(found.shape) if isinstance(found, Tensor) else found
            raise ValueError(
                f"the model gave its attention position_ids {got} for {query.shape[2]} tokens, by which a Tensor Cache cannot "
                "take the rotary phase off; use TensorCacheConfig(rotary=True), which leaves it on"
            )
        return found
