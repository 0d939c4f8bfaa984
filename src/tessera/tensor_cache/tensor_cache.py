"""`TensorCache`: the matrices of one layer and their rates; pairs that leave a window are written, and queries read."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import gumbel_softmax, logsigmoid, normalize, one_hot, pad

from tessera.finite import FiniteCheck
from tessera.kernels.precision import join
from tessera.modules import Float32Module
from tessera.tensor_cache.forms import recur
from tessera.tensor_cache.recurrence import loop
from tessera.tensor_cache.scan import scan
from tessera.tensor_cache.tensor_cache_config import Rule, TensorCacheConfig
from tessera.tensor_cache.tensor_cache_state import TensorCacheState


def logit(p: float) -> float:
    """Inverse of the sigmoid."""
    return math.log(p) - math.log1p(-p)


class TensorCache(Float32Module):
    """The associative memory of one attention layer (arXiv 2605.22884, section on the method).

    Args:
        config: see `TensorCacheConfig`.
        num_heads: key heads; each has matrices of its own, which all query heads that share the key head read.
        head_dim: length of a key and of a value.

    Parameters: `decay_logit`, `rate_logit` (heads,), started as `config` says; with rates "token" also `rate_weight`
    (heads, 2, 2 · head_dim), zero at the start; with a second timescale `slow_decay_logit`, `slow_rate_logit` and
    `slow_share` (heads,), the last zero; with slots `slot_keys` (heads, slots, head_dim), random directions.
    """

    def __init__(self, config: TensorCacheConfig, num_heads: int, head_dim: int) -> None:
        super().__init__()
        if num_heads < 1 or head_dim < 1:
            raise ValueError(f"a Tensor Cache needs heads and a head_dim, got {num_heads} and {head_dim}")
        self.config, self.num_heads, self.head_dim = config, num_heads, head_dim
        self._leasts: dict[tuple[int, int], float] = {}
        decays = torch.tensor([logit(decay) for decay in config.decays(num_heads)], dtype=torch.float32)
        self.decay_logit = nn.Parameter(decays)
        self.rate_logit = nn.Parameter(torch.full_like(decays, logit(config.write_rate)))
        if config.rates == "token":
            self.rate_weight = nn.Parameter(decays.new_zeros(num_heads, 2, 2 * head_dim))
        if config.slow is not None:
            self.slow_decay_logit = nn.Parameter(torch.full_like(decays, logit(config.slow[0])))
            self.slow_rate_logit = nn.Parameter(torch.full_like(decays, logit(config.slow[1])))
            self.slow_share = nn.Parameter(torch.zeros_like(decays))
        if config.slots > 1:
            directions = torch.randn(num_heads, config.slots, head_dim, dtype=torch.float32)
            self.slot_keys = nn.Parameter(normalize(directions, dim=-1))

    def extra_repr(self) -> str:
        """Describe the module in its `repr`."""
        return f"heads={self.num_heads}, head_dim={self.head_dim}, rule={self.config.rule!r}"

    def train(self, mode: bool = True) -> TensorCache:
        """Set the mode, see `nn.Module`; what is known of the parameters is forgotten."""
        self._leasts = {}
        return super().train(mode)

    @property
    def decay(self) -> Tensor:
        """λ of each head, (heads,); with rates "token" the part that does not depend on the token."""
        return torch.sigmoid(self.decay_logit.float())

    @property
    def write_rate(self) -> Tensor:
        """η of each head, (heads,); with rates "token" the part that does not depend on the token."""
        return torch.sigmoid(self.rate_logit.float())

    def initial_state(self, batch: int, like: Tensor | None = None) -> TensorCacheState:
        """Return an empty state. `like` gives the device and the dtype of pairs in the window."""
        device = self.decay_logit.device if like is None else like.device
        dtype = self.decay_logit.dtype if like is None else like.dtype
        matrices = (batch, self.num_heads * self.config.slots, self.head_dim)
        a = torch.zeros((*matrices, self.head_dim), dtype=torch.float32, device=device)
        return TensorCacheState(
            a=a,
            slow=torch.zeros_like(a) if self.config.slow else None,
            z=a.new_zeros((*matrices, 1)) if self.config.normalise_read else None,
            k=torch.zeros((batch, self.num_heads, 0, self.head_dim), device=device, dtype=dtype),
            v=torch.zeros((batch, self.num_heads, 0, self.head_dim), device=device, dtype=dtype),
            live=torch.zeros((batch, 0), device=device, dtype=torch.bool),
            seen=torch.zeros(batch, device=device, dtype=torch.long),
        )

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: TensorCacheState | None = None,
        real: Tensor | None = None,
        *,
        finite: FiniteCheck | None = None,
    ) -> tuple[Tensor, TensorCacheState]:
        """Compute the reads of whole sequences, or of the next part of them.

        Token t reads the writes of the tokens up to t - window ("read_first": t - window - 1), the sinks left out.

        Args:
            q: (batch, query heads, tokens, head_dim); the query heads are a multiple of `num_heads`.
            k, v: (batch, num_heads, tokens, head_dim).
            state: the state that the previous part returned; None: the sequences begin.
            real: (batch, tokens) bool, False for padding, which is never written; None: there is none.
            finite: told of keys and values that are not finite, on devices where it defers that; None: they are refused.

        Returns:
            read: (batch, query heads, tokens, head_dim) in the dtype of `q`, before any gate; and the new state.

        Raises:
            ValueError: for shapes that do not fit, and for keys or values that are not finite; the state is not changed.
        """
        state = self._checked(q, k, v, state, finite)
        batch, tokens = q.shape[0], q.shape[2]
        if k.shape[2] != tokens:
            raise ValueError(f"there are {tokens} queries and {k.shape[2]} keys; the parallel form takes as many of each")
        if real is None:
            real = torch.ones((batch, tokens), dtype=torch.bool, device=q.device)
        if tuple(real.shape) != (batch, tokens):
            raise ValueError(f"real {tuple(real.shape)} does not fit: expected ({batch}, {tokens}), a word for each token")
        number = state.seen[:, None] + real.cumsum(1) - 1
        live = torch.cat((state.live, real & (number >= self.config.sink)), dim=1)
        k, v = join((state.k, k), 2), join((state.v, v), 2)
        window, held = self.config.window, state.k.shape[2]
        # No pair leaves until the window is full.
        idle = min(tokens, max(0, window - held))
        leave = tokens - idle
        leaving_k, leaving_v = (pad(x[:, :, :leave], (0, 0, idle, 0)) for x in (k, v))
        read, state = self.advance(q, leaving_k, leaving_v, pad(live[:, :leave], (idle, 0)), state)
        stay = min(window, held + tokens)
        kept = {"k": k[:, :, k.shape[2] - stay :], "v": v[:, :, v.shape[2] - stay :], "live": live[:, live.shape[1] - stay :]}
        return read, replace(state, **kept, seen=state.seen + real.sum(1))

    def step(
        self, q: Tensor, evicted_k: Tensor | None, evicted_v: Tensor | None, state: TensorCacheState | None = None
    ) -> tuple[Tensor, TensorCacheState]:
        """Process one token of a stream whose window is kept elsewhere.

        Args:
            q: (batch, query heads, 1, head_dim).
            evicted_k, evicted_v: (batch, num_heads, 1, head_dim), the pair that leaves at this step, or None.
            state: as in `forward`; the pairs in it are not touched.

        Returns:
            read (batch, query heads, 1, head_dim) and the new state.
        """
        if (evicted_k is None) != (evicted_v is None):
            raise ValueError("a key leaves together with its value; one of them is missing")
        none = q.new_zeros((q.shape[0], self.num_heads, 1, q.shape[3]))
        k, v = (none, none) if evicted_k is None or evicted_v is None else (evicted_k, evicted_v)
        state = self._checked(q, k, v, state)
        live = torch.full((q.shape[0], 1), evicted_k is not None, dtype=torch.bool, device=q.device)
        return self.advance(q, k, v, live, state, by_loop=True)

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, live: Tensor, state: TensorCacheState, by_loop: bool = False
    ) -> tuple[Tensor, TensorCacheState]:
        """Write pair i at token i, where `live`, and read; the pairs of the window in `state` are not touched.

        Args:
            q: (batch, query heads, tokens, head_dim).
            k, v: (batch, num_heads, tokens, head_dim), the pair that leaves at each token.
            live: (batch, tokens) bool, False where nothing leaves.
            state: the matrices before the call.
            by_loop: token by token, the definition, instead of in chunks.
        """
        config, dtype = self.config, q.dtype
        with torch.autocast(q.device.type, enabled=False):
            q, k, v = q.float(), k.float(), v.float()
            pairs = torch.cat((k, v), dim=-1)
            if config.normalise_keys:
                k = normalize(k, dim=-1)
            if config.normalise_queries:
                q = normalize(q, dim=-1)
            v = v * config.value_scale
            q = q.unflatten(1, (self.num_heads, -1))
            decay, rate = self.decay_logit.float()[:, None], self.rate_logit.float()[:, None]
            if config.rates == "token":
                own = torch.einsum("bhtd,hrd->rbht", pairs, self.rate_weight.float())
                decay, rate = decay + own[0], rate + own[1]
            route, share = None, None
            if config.slots > 1:
                route, share = self._routes(k, q)
                q, k, v = self._to_slots(q, k, v)

            def run(
                decay: Tensor, rate: Tensor, a: Tensor, v: Tensor, least: float | None, rule: Rule = config.rule
            ) -> tuple[Tensor, Tensor]:
                g, eta = self._rates(decay, rate, live, route)
                if by_loop:
                    return loop(q, k, v, g, eta, a, rule, config.order)
                if config.write == "chunk_means":
                    mean_k, mean_v, eta = _means(k, v, eta, config.chunk)
                    return scan(q, mean_k, mean_v, g, eta, a, rule, config.order, config.chunk, least)
                return recur(q, k, v, g, eta, a, rule, config.order, config.chunk, None, least)

            least = None if config.rates == "token" else self._least(self.decay_logit)
            read, a = run(decay, rate, state.a, v, least)
            changed: dict[str, Tensor] = {"a": a}
            if config.slow is not None:
                assert state.slow is not None
                slow_rates = self.slow_decay_logit.float()[:, None], self.slow_rate_logit.float()[:, None]
                slow, changed["slow"] = run(*slow_rates, state.slow, v, self._least(self.slow_decay_logit))
                mix = torch.sigmoid(self.slow_share.float()).repeat_interleave(config.slots).view(1, -1, 1, 1, 1)
                read = read + mix * (slow - read)
            if config.normalise_read:
                assert state.z is not None
                ones = v.new_ones((*v.shape[:3], 1))
                weight, changed["z"] = run(decay, rate, state.z, ones, least, "outer")
                read = read / weight.abs().clamp(min=1.0)
            if share is not None:
                read = (read.unflatten(1, (self.num_heads, config.slots)) * share.unsqueeze(-1)).sum(2)
            return read.flatten(1, 2).to(dtype), replace(state, **changed)

    def _least(self, logit: Tensor) -> float | None:
        """The smallest logarithm of a decay, which is read from the device once after training; None: it is not known."""
        if torch.is_grad_enabled() or logit.is_inference():
            return None  # the parameter changes, or its changes are not counted
        key = logit.data_ptr(), logit._version
        known = self._leasts.get(key)
        if known is None:
            self._leasts = {other: each for other, each in self._leasts.items() if other[0] != key[0]}
            known = self._leasts[key] = float(logsigmoid(logit.detach().float()).amin())
        return known

    def _rates(self, decay: Tensor, rate: Tensor, live: Tensor, route: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return log-decays and write rates of all matrices, (batch, heads · slots, tokens); zero where no pair leaves."""
        shape = (live.shape[0], self.num_heads, live.shape[1])
        g, eta = logsigmoid(decay).expand(shape), torch.sigmoid(rate).expand(shape)
        if self.config.rule == "delta":
            eta = torch.minimum(eta, g.exp())  # beyond this, corrections overshoot
        g, eta = (x.masked_fill(~live[:, None], 0.0) for x in (g, eta))
        if route is None:
            return g, eta
        return g.repeat_interleave(self.config.slots, 1), (eta.unsqueeze(2) * route).flatten(1, 2)

    def _routes(self, k: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Route pairs to slots, (batch, heads, slots, tokens), hard with a soft gradient, and weight the slots for queries."""
        config = self.config
        scale = self.head_dim**0.5
        keys = self.slot_keys.float()
        scores = torch.einsum("bhtd,hsd->bhts", k, keys) * scale
        if self.training and config.slot_noise > 0:
            hard = gumbel_softmax(scores / config.slot_noise, hard=True)
        else:
            soft = scores.softmax(-1)
            hard = one_hot(soft.argmax(-1), config.slots) + soft - soft.detach()
        wanted = torch.einsum("bhgtd,hsd->bhgts", q, keys) * scale
        best = wanted.topk(config.top_k, dim=-1)
        share = torch.zeros_like(wanted).scatter(-1, best.indices, best.values.softmax(-1))
        return hard.transpose(2, 3), share.permute(0, 1, 4, 2, 3)

    def _to_slots(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        slots = self.config.slots
        return q.repeat_interleave(slots, 1), k.repeat_interleave(slots, 1), v.repeat_interleave(slots, 1)

    @staticmethod
    def check_finite(k: Tensor, v: Tensor, finite: FiniteCheck | None = None) -> None:
        """Refuse numbers that are not finite, which would corrupt the state; `finite` may defer that."""
        (FiniteCheck(at_once=True) if finite is None else finite).look(k, v)

    def _checked(
        self, q: Tensor, k: Tensor, v: Tensor, state: TensorCacheState | None, finite: FiniteCheck | None = None
    ) -> TensorCacheState:
        batch, dim = q.shape[0], self.head_dim
        if q.ndim != 4 or q.shape[3] != dim or q.shape[1] % self.num_heads:
            raise ValueError(
                f"queries {tuple(q.shape)} do not fit: expected (batch, a multiple of {self.num_heads}, tokens, {dim})"
            )
        for name, x in (("keys", k), ("values", v)):
            if x.ndim != 4 or x.shape[:2] != (batch, self.num_heads) or x.shape[3] != dim or x.shape[2] != k.shape[2]:
                raise ValueError(f"{name} {tuple(x.shape)} do not fit: expected ({batch}, {self.num_heads}, tokens, {dim})")
        self.check_finite(k, v, finite)
        if state is None:
            return self.initial_state(batch, k)
        matrices = (batch, self.num_heads * self.config.slots, dim, dim)
        if tuple(state.a.shape) != matrices:
            raise ValueError(f"a state of matrices {tuple(state.a.shape)} does not fit: expected {matrices}")
        if (state.slow is None) != (self.config.slow is None) or (state.z is None) == self.config.normalise_read:
            raise ValueError("the state is of a Tensor Cache with other options")
        return state


def _means(k: Tensor, v: Tensor, eta: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return each chunk's mean key and mean value, written once at its end with the weight of all its pairs."""
    tokens = k.shape[2]
    rest = -tokens % chunk
    out = []
    for x in (k, v):
        cut = pad(x, (0, 0, 0, rest)).unflatten(2, (-1, chunk))
        count = pad(x.new_ones(tokens), (0, rest)).view(-1, chunk).sum(1)
        mean = cut.sum(3, keepdim=True) / count[:, None, None]
        out.append(mean.expand_as(cut).flatten(2, 3)[:, :, :tokens])
    total = pad(eta, (0, rest)).unflatten(2, (-1, chunk)).sum(-1, keepdim=True).expand(-1, -1, -1, chunk).flatten(2, 3)
    place = torch.arange(tokens, device=k.device)
    last = (place % chunk == chunk - 1) | (place == tokens - 1)
    return out[0], out[1], total[:, :, :tokens] * last
