"""`TensorMemory`: a grid of cells, written and read by the tokens of one layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, softplus

from tessera.devices import upload
from tessera.finite import FiniteCheck, finite_only
from tessera.kernels import dispatch
from tessera.kernels.recurrent_grid import Gates, Steps
from tessera.modules import Float32Module
from tessera.tensor_memory.coordinates import gaussian, nearest, positions, sample, solid
from tessera.tensor_memory.paper_step import gate_inputs, update
from tessera.tensor_memory.tensor_memory_config import SIGMA_LEAST, TensorMemoryConfig
from tessera.tensor_memory.tensor_memory_state import TensorMemoryState

#: Maximum learned offset from a token's own place, on a grid from -1 to 1.
REACH = 0.5

DIVERGED = "the weights of this Tensor Memory give numbers that are not finite: its training has diverged"


@dataclass(frozen=True, eq=False)
class Writes:
    """The writes of chunks.

    Attributes:
        at: (batch, steps, n), places in [-1, 1].
        sigma: (batch, steps), how far they reach.
        content: (batch, steps, channels).
    """

    at: Tensor
    sigma: Tensor
    content: Tensor


Recurrence = Callable[[Tensor, Tensor | None, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class TensorMemory(Float32Module):
    """The spatial memory of one layer (arXiv 2605.27686, section on the method).

    Args:
        config: see `TensorMemoryConfig`.
        dim: width of a token, E.

    Parameters, names and starts after the paper where no other source is given; as `torch.nn.Linear` starts them unless said
    otherwise:
        coord_net: E -> n, the place of a read, before the tanh; with coordinates "separate" also `write_coord_net`. With
            `anchored`, which is ours, zero at the start.
        write_proj: chunk · E -> E; with projection "light", which is ours, `write_weight` (chunk, E), 1 / chunk, and
            `write_bias` (E,), zero.
        content_net: E -> channels.
        sigma_net: E -> 1; its bias such that sigma starts about `config.sigma_init`: the paper's 1.31 is a bias of 1, 0.3 is
            ours. Where the paper multiplies sigma by a scale besides, that is 1 here, for the bias can do the same.
        taps: (n, inputs, 3), the stencil, the identity at the start, without a bias, which would be one of the gates but for
            the border; with convolution "pointwise" none.
        gates_weight: (4 channels, inputs), rows i, f, o, g; Xavier uniform. inputs: 2 channels, what is written and h; or
            channels with gates "input", which are ours.
        gates_bias: (4 channels,), zero but for the forget gate's, `config.forget_bias`: 0 in the paper, 3 is ours, after what
            LSTMs take (R. Jozefowicz and others, 2015, take 1).
        out_proj: channels -> E.
    """

    def __init__(self, config: TensorMemoryConfig, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"a Tensor Memory needs tokens of a dim of at least 1, got {dim}")
        self.config, self.dim = config, dim
        axes, channels, chunk = len(config.grid), config.channels, config.chunk
        self.coord_net = _net(dim, axes)
        nets = [self.coord_net]
        if config.coordinates == "separate":
            self.write_coord_net = _net(dim, axes)
            nets.append(self.write_coord_net)
        if config.anchored:
            for net in nets:
                nn.init.zeros_(net.weight)
                nn.init.zeros_(net.bias)
        if config.projection == "full":
            self.write_proj = _net(chunk * dim, dim)
        else:
            self.write_weight = nn.Parameter(torch.full((chunk, dim), 1 / chunk, dtype=torch.float32))
            self.write_bias = nn.Parameter(torch.zeros(dim, dtype=torch.float32))
        self.content_net = _net(dim, channels)
        self.sigma_net = _net(dim, 1)
        nn.init.constant_(self.sigma_net.bias, _before_softplus(config.sigma_init - SIGMA_LEAST))
        inputs = channels if config.gates == "input" else 2 * channels
        if config.convolution == "factorised":
            self.taps = nn.Parameter(torch.tensor([0.0, 1.0, 0.0], dtype=torch.float32).repeat(axes, inputs, 1))
        else:
            self.register_parameter("taps", None)
        self.gates_weight = nn.Parameter(torch.empty(4 * channels, inputs, dtype=torch.float32))
        nn.init.xavier_uniform_(self.gates_weight)
        self.gates_bias = nn.Parameter(torch.zeros(4 * channels, dtype=torch.float32))
        nn.init.constant_(self.gates_bias[channels : 2 * channels], config.forget_bias)
        self.out_proj = _net(channels, dim)

    def extra_repr(self) -> str:
        """Describe the module in its `repr`."""
        config = self.config
        return f"channels={config.channels}, grid={config.grid}, chunk={config.chunk}, dim={self.dim}"

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.gates_bias.device

    def initial_state(self, batch: int, device: torch.device | None = None) -> TensorMemoryState:
        """Return an empty state."""
        cells = (batch, self.config.channels, *self.config.grid)
        h = torch.zeros(cells, dtype=torch.float32, device=device or self.device)
        places = h.new_zeros((batch, 0, len(self.config.grid))) if self.config.anchored else None
        return TensorMemoryState(h, torch.zeros_like(h), h.new_zeros((batch, 0, self.dim)), places)

    def forward(
        self,
        x: Tensor,
        state: TensorMemoryState | None = None,
        places: Tensor | None = None,
        backend: str | None = None,
        finite: FiniteCheck | None = None,
    ) -> tuple[Tensor, TensorMemoryState]:
        """Compute the reads of whole sequences, or of the next part of them.

        A token reads what the chunks before its own have written. The tokens of an incomplete chunk at the end wait in the
        state.

        Args:
            x: (batch, tokens, dim).
            state: the state that the previous part returned; None: the sequences begin. A non-causal model may continue the
                state of the layer before (`flush` it first); in a causal model the first token would then see what the layer
                before wrote for the last one, so every layer needs a state of its own.
            places: (batch, tokens, n) or (tokens, n), (x, y, z) from -1 to 1, for `config.anchored`.
            backend: see `tessera.kernels.dispatch.attend`.
            finite: receives findings on devices where it defers them; None: numbers that are not finite are refused at once.

        Returns:
            out: (batch, tokens, dim) in the dtype of `x`, before any gate; and the new state.

        Raises:
            ValueError: for shapes that do not fit and numbers that are not finite; the state is not changed.
        """

        def fast(chunks: Tensor, chunk_places: Tensor | None, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            at = self.coordinates(chunks, chunk_places)
            return self.advance(at, self.writes(chunks, chunk_places, at), h, c, backend, finite)

        return self._run(x, state, places, fast, finite)

    def reference(
        self, x: Tensor, state: TensorMemoryState | None = None, places: Tensor | None = None
    ) -> tuple[Tensor, TensorMemoryState]:
        """Compute `forward` as a plain loop over the steps: the definition."""
        return self._run(x, state, places, self._loop)

    def flush(self, state: TensorMemoryState) -> TensorMemoryState:
        """Write the waiting tokens at the end of sequences, padded with zeros as in the paper; returns the new state."""
        missing = -state.waiting.shape[1] % self.config.chunk
        if missing == 0:
            return state
        zeros = state.waiting.new_zeros((len(state.waiting), missing, self.dim))
        places = None if state.places is None else state.places[:, -1:].expand(-1, missing, -1)
        return self(zeros, state, places)[1]

    def coordinates(self, chunks: Tensor, places: Tensor | None = None) -> Tensor:
        """Compute the places that chunks read: (batch, steps, tokens, dim) -> (batch, steps, reads, n)."""
        if self.config.read == "chunk":
            chunks, places = chunks[:, :, :1], None if places is None else places[:, :, :1]
        return self._place(self.coord_net, chunks, places)

    def writes(self, chunks: Tensor, places: Tensor | None, read_at: Tensor) -> Writes:
        """Compute the writes of whole chunks.

        Args:
            chunks: (batch, steps, chunk, dim).
            places: (batch, steps, chunk, n), or None.
            read_at: the result of `coordinates`.
        """
        config = self.config
        if config.projection == "full":
            w = _linear(self.write_proj, chunks.flatten(2))
        else:
            w = torch.einsum("btjd,jd->btd", chunks, self.write_weight.float()) + self.write_bias.float()
        if config.coordinates == "agree":
            at = read_at.mean(2)
        else:
            net = self.coord_net if config.coordinates == "shared" else self.write_coord_net
            at = self._place(net, w, None if places is None else places.mean(2))
        sigma = softplus(_linear(self.sigma_net, w)).squeeze(-1) + SIGMA_LEAST
        return Writes(at, sigma, _linear(self.content_net, w))

    def footprint(self, writes: Writes) -> tuple[Tensor, ...]:
        """Compute the weight of each cell in each write, by axes of the grid: (batch, steps, size) each."""
        if self.config.write == "nearest":
            return nearest(writes.at, self.config.grid)
        return gaussian(writes.at, writes.sigma, self.config.grid, local=self.config.update == "footprint")

    def advance(
        self,
        read_at: Tensor,
        writes: Writes,
        h: Tensor,
        c: Tensor,
        backend: str | None = None,
        finite: FiniteCheck | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run all steps: the part that does not depend on the state at once, the rest in `tessera.kernels.dispatch.advance`.

        Args:
            read_at: (batch, steps, reads, n).
            writes: the writes of as many steps.
            h, c: (batch, channels, *grid).
            backend, finite: see `forward`.

        Returns:
            what is read, (batch, steps, reads, channels); h and c at the end.

        Raises:
            ValueError: if the weights give numbers that are not finite.
        """
        config = self.config
        channels, axes = config.channels, len(config.grid)
        # A kernel may take a place that is not a number for one of the grid's.
        read_at = finite_only(read_at, DIVERGED, finite)
        writes = replace(writes, at=finite_only(writes.at, DIVERGED, finite))
        factors = self.footprint(writes)
        missing = 3 - axes
        one = h.new_ones((*writes.sigma.shape, 1))
        vectors = [one.unsqueeze(-1).expand(-1, -1, -1, channels)] * missing
        taps = None
        if self.taps is None:
            vectors += [f.unsqueeze(-1).expand(-1, -1, -1, channels) for f in factors]
        else:
            own = self.taps.float()
            # The stencil of a product is a product of stencils.
            around = (pad(f, (1, 1)).unfold(-1, 3, 1) for f in factors)
            vectors += [near @ tap[:channels].T for near, tap in zip(around, own, strict=True)]
            if config.gates == "state":
                same = upload(torch.tensor([0.0, 1.0, 0.0], dtype=own.dtype), own.device).expand(missing, channels, 3)
                taps = torch.cat((same, own[:, channels:]))
        vectors[-1] = vectors[-1] * writes.content.unsqueeze(2)
        for what in (vectors[-1], self.gates_weight, self.gates_bias):
            finite_only(what, DIVERGED, finite)
        mask = (*[one] * missing, *factors) if config.update == "footprint" else None
        read = pad(positions(read_at, config.grid), (missing, 0))
        steps = Steps(tuple(vectors), mask, read)  # type: ignore[arg-type]
        gates = Gates(self.gates_weight.float(), self.gates_bias.float(), taps)
        reads, new_h, new_c = dispatch.advance(solid(h), solid(c), steps, gates, backend)
        return reads, new_h.view_as(h), new_c.view_as(c)

    def _loop(self, chunks: Tensor, places: Tensor | None, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        reads = []
        for t in range(chunks.shape[1]):
            now, where = chunks[:, t : t + 1], None if places is None else places[:, t : t + 1]
            at = self.coordinates(now, where)
            writes = self.writes(now, where, at)
            reads.append(sample(h, at[:, 0]))
            factors = self.footprint(writes)
            seen = gate_inputs(writes.content[:, 0], [f[:, 0] for f in factors], h if self.config.gates == "state" else None)
            mask = [f[:, 0] for f in factors] if self.config.update == "footprint" else None
            h, c = update(h, c, seen, self.taps, self.gates_weight.float(), self.gates_bias.float(), mask)
        return torch.stack(reads, dim=1), h, c

    def _run(
        self,
        x: Tensor,
        state: TensorMemoryState | None,
        places: Tensor | None,
        recurrence: Recurrence,
        finite: FiniteCheck | None = None,
    ) -> tuple[Tensor, TensorMemoryState]:
        x, state, places = self._checked(x, state, places, finite)
        if x.shape[1] == 0:
            return x, state
        with torch.autocast(x.device.type, enabled=False):
            chunk, held = self.config.chunk, state.waiting.shape[1]
            tokens = torch.cat((state.waiting, x.float()), dim=1)
            if places is not None and state.places is not None:
                places = torch.cat((state.places, places), dim=1)
            steps, rest = divmod(tokens.shape[1], chunk)
            ends = steps * chunk
            parts, h, c = [], state.h, state.c
            if steps:
                cut = None if places is None else places[:, :ends].unflatten(1, (steps, chunk))
                reads, h, c = recurrence(tokens[:, :ends].unflatten(1, (steps, chunk)), cut, h, c)
                parts.append(self._out(reads, chunk).flatten(1, 2))
            # Copied, because a view would keep all tokens of the call in memory.
            waiting, left = tokens[:, ends:].clone(), None if places is None else places[:, ends:].clone()
            if rest:
                at = self.coordinates(waiting.unsqueeze(1), None if left is None else left.unsqueeze(1))
                parts.append(self._out(sample(h, at[:, 0]), rest))
            out = torch.cat(parts, dim=1)[:, held:].to(x.dtype)
        return out, replace(state, h=h, c=c, waiting=waiting, places=left)

    def _out(self, reads: Tensor, tokens: int) -> Tensor:
        """Project reads (..., reads, channels), one for all tokens or one for each, to outputs (..., tokens, dim)."""
        return _linear(self.out_proj, reads).expand(*reads.shape[:-2], tokens, -1)

    def _place(self, net: nn.Linear, x: Tensor, places: Tensor | None) -> Tensor:
        offset = torch.tanh(_linear(net, x))
        return offset if places is None else (places + REACH * offset).clamp(-1, 1)

    def _checked(
        self, x: Tensor, state: TensorMemoryState | None, places: Tensor | None, finite: FiniteCheck | None
    ) -> tuple[Tensor, TensorMemoryState, Tensor | None]:
        config = self.config
        if x.ndim != 3 or x.shape[2] != self.dim:
            raise ValueError(f"tokens {tuple(x.shape)} do not fit: expected (batch, tokens, {self.dim})")
        x = finite_only(x, "tokens must be finite; a grid that has absorbed NaN or infinity never recovers", finite)
        batch, axes = x.shape[0], len(config.grid)
        if (places is None) == config.anchored:
            raise ValueError(
                "an anchored Tensor Memory needs the places of the tokens"
                if config.anchored
                else "places are for a Tensor Memory with anchored=True"
            )
        if places is not None:
            if tuple(places.shape) not in ((batch, x.shape[1], axes), (x.shape[1], axes)):
                raise ValueError(f"places {tuple(places.shape)} do not fit: expected ({batch}, {x.shape[1]}, {axes})")
            if not bool((places.abs() <= 1).all()):
                raise ValueError("places must lie between -1 and 1")
            places = places.float().expand(batch, -1, -1)
        if state is None:
            return x, self.initial_state(batch, x.device), places
        grids = (batch, config.channels, *config.grid)
        for name, tensor in (("h", state.h), ("c", state.c)):
            if tuple(tensor.shape) != grids:
                raise ValueError(f"a state with {name} of {tuple(tensor.shape)} does not fit: expected {grids}")
            if tensor.dtype != torch.float32:
                raise ValueError(f"a state is kept in float32, got {name} in {tensor.dtype}")
            if tensor.device != x.device:
                raise ValueError(f"the state is on {tensor.device} and the tokens on {x.device}; see TensorMemoryState.to")
            finite_only(tensor, f"{name} of the state must be finite; it cannot be gone on with", finite)
        if state.waiting.ndim != 3 or state.waiting.shape[::2] != (batch, self.dim) or state.waiting.shape[1] >= config.chunk:
            raise ValueError(
                f"a state in which {tuple(state.waiting.shape)} wait does not fit: "
                f"expected ({batch}, less than {config.chunk}, {self.dim})"
            )
        if (state.places is not None) != config.anchored:
            raise ValueError("the state is of a Tensor Memory with other options")
        return x, state, places


def _before_softplus(y: float) -> float:
    """Return x with softplus(x) = y, without overflow."""
    return y + math.log(-math.expm1(-y))


def _net(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, dtype=torch.float32)


def _linear(net: nn.Module, x: Tensor) -> Tensor:
    """Apply a net in float32, whatever the dtype of its weights. A wrapper, such as LoRA, computes its own part."""
    if type(net) is nn.Linear:
        return linear(x, net.weight.float(), net.bias.float())
    out: Tensor = net(x)
    return out
