"""Small causal transformers over continuous tokens, with equal numbers of parameters, with and without a Tensor Memory.

They differ in one feature: nothing ("plain"), a wider MLP ("wide"), learned keys and values in front of every
sequence ("slots"), or a Tensor Memory between attention and MLP ("memory"), whose weights all layers share and whose state is
each layer's own, so that no output depends on a later token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from tessera import grammar
from tessera.tensor_memory import TensorMemory, TensorMemoryConfig

Kind = Literal["plain", "wide", "slots", "memory"]
KINDS: tuple[Kind, ...] = ("plain", "wide", "slots", "memory")
#: The gate of a layer's memory before training (the paper's, -2 before the sigmoid).
OPEN_AT_FIRST = 1 / (1 + math.exp(2))


@dataclass(frozen=True)
class BackboneConfig:
    """The configuration of a backbone."""

    features: int
    """Number of features of a token."""
    classes: int
    """Number of possible answers."""
    kind: Kind = "memory"
    """Kind, see the module. "wide" and "slots" have as many parameters as "memory" within 1 %; "plain" has fewer."""
    attention: str = "whole"
    """Range of attention: "whole", "window:W" (the newest W tokens, the own included) or "frame" (the current frame)."""
    frame: int = 1
    """Number of tokens of a frame."""
    place: tuple[int, int] | None = None
    """Range [first, end) of the features that are a token's place; None: there are none."""
    width: int = 64
    """Width of the residual stream."""
    layers: int = 2
    """Number of layers, each with attention, memory and MLP."""
    heads: int = 4
    """Number of heads of attention."""
    hidden: int = 256
    """Width of the MLP, except for "wide"."""
    memory: TensorMemoryConfig = field(default_factory=lambda: TensorMemoryConfig(channels=32))
    """Configuration of the memory of kind "memory", which also sets the number of parameters of the other kinds."""

    def __post_init__(self) -> None:
        for name in ("features", "classes", "frame", "width", "layers", "heads", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {self.kind!r}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be an even multiple of the {self.heads} heads, got {self.width}")
        axes = 0 if self.place is None else self.place[1] - self.place[0]
        if self.kind == "memory" and self.memory.anchored and axes != len(self.memory.grid):
            raise ValueError(f"anchored=True on a grid of {len(self.memory.grid)} axes; the tokens' places have {axes}")
        self.window()

    def window(self) -> int | None:
        """Return the window of attention, W, in tokens; None if there is none.

        Raises:
            ValueError: if `attention` is unknown.
        """
        return grammar.one(self.attention, {"whole": "whole", "frame": "frame", "window": "window:8"})[1]

    def reach(self) -> int | None:
        """Return the number of tokens, the newest included, that all layers together reach; None: all, or those of a frame."""
        window = self.window()
        return None if window is None else self.layers * (window - 1) + 1


class Answer(NamedTuple):
    """Attributes: logits: (batch, tokens, classes)."""

    logits: Tensor


class Attention(nn.Module):
    """Causal attention with rotary positions, over the tokens that a mask shows and over learned slots.

    Args:
        width: width of the tokens.
        heads: number of heads.
        slots: learned tokens, which every token sees.
    """

    def __init__(self, width: int, heads: int, slots: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.slots = nn.Parameter(torch.randn(slots, width)) if slots else None
        self.rates: Tensor
        self.register_buffer("rates", 10_000 ** -torch.linspace(0, 1, width // heads // 2), persistent=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: (batch, tokens, width), mask: (tokens, tokens) bool -> (batch, tokens, width)."""
        q, k, v = self._heads(x)
        at = torch.arange(x.shape[1], device=x.device)[:, None] * self.rates
        q, k = _rotate(q, at), _rotate(k, at)
        if self.slots is not None:
            _, k_slots, v_slots = self._heads(self.slots.expand(len(x), -1, -1))
            k, v = torch.cat((k_slots, k), dim=2), torch.cat((v_slots, v), dim=2)
            mask = nn.functional.pad(mask, (len(self.slots), 0), value=True)
        return self.out(scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _rotate(x: Tensor, at: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = at.cos().to(x.dtype), at.sin().to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Layer(nn.Module):
    """A layer of attention, memory and MLP, each added to the residual stream.

    Args:
        config: configuration of the backbone.
        hidden: width of the MLP.
        slots: number of learned keys and values in attention.
    """

    def __init__(self, config: BackboneConfig, hidden: int, slots: int) -> None:
        super().__init__()
        width = config.width
        self.attention_norm, self.attention = nn.LayerNorm(width), Attention(width, config.heads, slots)
        if config.kind == "memory":
            self.memory_norm = nn.LayerNorm(width)
            self.memory_logit = nn.Parameter(torch.tensor(OPEN_AT_FIRST).logit())
        self.mlp_norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, mask: Tensor, memory: TensorMemory | None, places: Tensor | None) -> Tensor:
        """x: (batch, tokens, width), places: (batch, tokens, axes of the grid), of an anchored memory."""
        x = x + self.attention(self.attention_norm(x), mask)
        if memory is not None:
            read, _ = memory(self.memory_norm(x), None, places)
            x = x + self.memory_logit.sigmoid() * read
        return x + self.down(gelu(self.up(self.mlp_norm(x))))


class Backbone(nn.Module):
    """A small causal transformer from tokens to answers.

    Args:
        config: see `BackboneConfig`.
        hidden: width of the MLP; None: `config.hidden`.
        slots: learned tokens of each layer.
    """

    def __init__(self, config: BackboneConfig, hidden: int | None = None, slots: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.features, config.width)
        self.memory = TensorMemory(config.memory, config.width) if config.kind == "memory" else None
        self.layers = nn.ModuleList(Layer(config, hidden or config.hidden, slots) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.classes)

    def forward(self, input_ids: Tensor) -> Answer:
        """Compute answers. input_ids: (batch, tokens, features), floating-point; the training loop requires this name."""
        x, mask = self.embed(input_ids), self.mask(input_ids.shape[1], input_ids.device)
        places = None
        if self.config.place is not None and self.config.memory.anchored:
            places = input_ids[..., slice(*self.config.place)].clamp(-1, 1)
        for layer in self.layers:
            x = layer(x, mask, self.memory, places)
        return Answer(self.head(self.norm(x)))

    def gates(self) -> list[Tensor]:
        """Return each layer's gate, from 0 to 1; an empty result for kinds without a memory."""
        logits = [p for name, p in self.named_parameters() if name.endswith("memory_logit")]
        return [logit.detach().sigmoid() for logit in logits]

    def mask(self, tokens: int, device: torch.device | None = None) -> Tensor:
        """Make the mask of the tokens (columns) that a token (row) attends to, (tokens, tokens) bool."""
        at = torch.arange(tokens, device=device)
        back = at[:, None] - at
        window = self.config.window()
        if self.config.attention == "frame":
            frame = at // self.config.frame
            return (back >= 0) & (frame[:, None] == frame)
        return (back >= 0) & (back < (window or tokens))


def build_backbone(config: BackboneConfig, seed: int = 0) -> Backbone:
    """Build the untrained model, the same for the same seed; "wide" and "slots" get the number of parameters of "memory"."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        if config.kind in ("plain", "memory"):
            return Backbone(config)
        missing = parameters(_hollow(replace(config, kind="memory"))) - parameters(_hollow(replace(config, kind="plain")))
        if config.kind == "slots":
            return Backbone(config, slots=max(1, round(missing / (config.layers * config.width))))
        return Backbone(config, config.hidden + round(missing / (config.layers * (2 * config.width + 1))))


def parameters(model: nn.Module) -> int:
    """Count the parameters of a model."""
    return sum(p.numel() for p in model.parameters())


def _hollow(config: BackboneConfig) -> Backbone:
    with torch.device("meta"):
        return Backbone(config)
