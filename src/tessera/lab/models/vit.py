"""`ViT`: a small vision transformer for images and clips, with attention over frames as a spec says and a Tensor Memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from tessera import grammar
from tessera.lab.models.vit_state import ViTState
from tessera.tensor_memory.gated_layer import make_layers, make_memory
from tessera.tensor_memory.tensor_memory import TensorMemory
from tessera.tensor_memory.tensor_memory_config import TensorMemoryConfig
from tessera.tensor_memory.tensor_memory_state import TensorMemoryState


class ViTConfig(PreTrainedConfig):
    """The configuration of a `ViT`.

    Attributes:
        image_size: pixels along each side of a frame.
        patch_size: side of a patch in pixels; divides `image_size`.
        num_channels: channels of a pixel.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: as in transformers' ViT.
        classes: number of labels of a frame; 0: the model predicts the pixels of every patch instead.
        positions: "learned" for each patch of a frame, or "sincos". Frames are numbered by sines and cosines.
        attention: frames that a patch sees. "all": every frame of the clip; "frame": its own; "window:4": the newest four,
            which are numbered modulo four, so that a stream far longer than those of training has no unseen number.
        memory: fields of `TensorMemoryConfig`, or None. With attention "all" the state is passed from layer to layer; otherwise
            every layer has its own, and no output depends on a later frame. Anchored, a patch is at its (x, y) in the frame,
            with a grid of three axes at (x, y, t), where t is the frame's number, from the first to the last of the clip or of
            the window.
    """

    model_type = "tessera_vit"

    def __init__(
        self,
        image_size: int = 8,
        patch_size: int = 2,
        num_channels: int = 1,
        hidden_size: int = 64,
        intermediate_size: int = 128,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        classes: int = 10,
        positions: str = "learned",
        attention: str = "all",
        memory: dict[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        if image_size < 1 or patch_size < 1 or image_size % patch_size:
            raise ValueError(f"patch_size {patch_size} does not divide image_size {image_size}")
        if hidden_size % (2 * num_attention_heads):
            raise ValueError(f"hidden_size {hidden_size} must be a multiple of twice num_attention_heads {num_attention_heads}")
        if hidden_size % 4:
            raise ValueError(f"hidden_size must be a multiple of 4, for sines and cosines of two axes; got {hidden_size}")
        if positions not in ("learned", "sincos"):
            raise ValueError(f"positions must be 'learned' or 'sincos', got {positions!r}")
        window = read_frames(attention)
        if memory is not None:
            known = TensorMemoryConfig.from_dict(memory)
            if known.anchored and len(known.grid) == 1:
                raise ValueError("anchored=True needs a grid of two or three axes, for the (x, y) or (x, y, t) of a patch")
            if known.threaded and window is not None:
                raise ValueError(
                    f"threaded=True would show frames to those before them with attention {attention!r}; leave it out"
                )
            memory = known.to_dict()
        self.image_size, self.patch_size, self.num_channels = image_size, patch_size, num_channels
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.positions, self.attention, self.memory = positions, attention, memory
        self.classes = classes
        super().__init__(**fields)

    @property
    def patches(self) -> int:
        """Number of patches of a frame."""
        return (self.image_size // self.patch_size) ** 2


def read_frames(attention: str) -> int | None:
    """Return the number of frames that a patch sees, its own included; None: all.

    Raises:
        ValueError: for any other word.
    """
    name, count = grammar.one(attention, {"all": "all", "frame": "frame", "window": "window:4"}, "frames")
    return {"all": None, "frame": 1}.get(name, count)


@dataclass
class ViTOutput(ModelOutput):
    """The output of a `ViT`.

    Attributes:
        logits: (batch, frames, classes), or (batch, frames, patches, pixels of a patch); without frames for images.
        state: the state for the next frames; None with attention "all".
    """

    logits: Tensor | None = None
    state: ViTState | None = None


class Block(nn.Module):
    """One layer of attention and an MLP."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, config.intermediate_size), nn.Linear(config.intermediate_size, width)

    def attend(
        self, x: Tensor, patches: int, window: int | None, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Compute attention, (batch, tokens, width), and return also the keys and values that later frames see."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        mask = None
        if window is not None:
            frame = torch.arange(k.shape[2], device=x.device) // patches
            own = frame[-q.shape[2] :, None]
            mask = (frame <= own) & (frame > own - window)
        read = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        kept = 0 if window is None else min(k.shape[2], (window - 1) * patches)
        rest = k.shape[2] - kept
        return self.out(read.transpose(1, 2).flatten(2)), (k[:, :, rest:], v[:, :, rest:])

    def mlp(self, x: Tensor) -> Tensor:
        """Apply the MLP to the residual stream."""
        y: Tensor = self.down(gelu(self.up(self.norm2(x))))
        return y


class ViT(PreTrainedModel):
    """A vision transformer for images, clips, and streams of frames; `save_pretrained` and `from_pretrained`."""

    config_class = ViTConfig
    main_input_name = "pixel_values"

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        width, pixels = config.hidden_size, config.num_channels * config.patch_size**2
        self.embed = nn.Linear(pixels, width)
        self.place = nn.Embedding(config.patches, width) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.classes or pixels)
        self.hidden = nn.Parameter(torch.zeros(width)) if config.classes == 0 else None
        if self.place is not None:
            # As large as the sines and cosines of frames, to which they are added.
            nn.init.normal_(self.place.weight, std=0.5)
        self.memory: TensorMemory | None = None
        self.memory_layers = nn.ModuleDict()
        self.threaded = False
        if config.memory is not None:
            memory = TensorMemoryConfig.from_dict(config.memory)
            self.memory = make_memory(memory, width)
            self.memory_layers.update({str(i): m for i, m in make_layers(memory, width, len(self.blocks)).items()})
            self.threaded = config.attention == "all" and memory.threaded is not False
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: modules initialise themselves, and a common rule for linear layers would overwrite a memory's weights."""

    def _check(self, state: ViTState, batch: int) -> None:
        """Refuse a state of another model, or of another number of streams, before anything is computed."""
        config, layers = self.config, len(self.blocks)
        if len(state.windows) != layers or len(state.memories) != layers:
            raise ValueError(f"a state of {len(state.windows)} layers does not fit a model of {layers}")
        rows, heads, dim = batch, config.num_attention_heads, config.hidden_size // config.num_attention_heads
        for index, (pair, memory) in enumerate(zip(state.windows, state.memories, strict=True)):
            if not _fits(pair, (rows, heads, dim)):
                shapes = " and ".join(str(tuple(x.shape)) for x in pair)
                raise ValueError(f"a state of {shapes} does not fit: expected ({rows}, {heads}, patches, {dim})")
            if (memory is None) == (str(index) in self.memory_layers):
                other = "without" if memory is None else "with"
                raise ValueError(f"the state is of a model {other} a memory in layer {index}")

    def _places(self, times: Tensor, count: int) -> Tensor | None:
        """Compute the places of patches for an anchored memory, (tokens, axes of the grid), each axis from -1 to 1.

        Args:
            times: numbers of frames, (frames,), from 0 to `count` - 1.
            count: number of frames of a clip or of a window; a single frame is in the middle.
        """
        if self.memory is None or not self.memory.config.anchored:
            return None
        side = self.config.image_size // self.config.patch_size
        along = torch.linspace(-1, 1, side, device=times.device) if side > 1 else torch.zeros(1, device=times.device)
        t = 2 * times / (count - 1) - 1 if count > 1 else torch.zeros_like(times, dtype=torch.float32)
        t, y, x = (part.flatten() for part in torch.meshgrid(t, along, along, indexing="ij"))
        return torch.stack((x, y, t)[: len(self.memory.config.grid)], dim=-1)

    def forward(self, pixel_values: Tensor, state: ViTState | None = None, masked: Tensor | None = None) -> ViTOutput:
        """Run the model on images, whole clips, or the next frames of streams.

        Args:
            pixel_values: (batch, channels, height, width), or (batch, frames, channels, height, width).
            state: the state returned by the call on the previous frames; None: the streams begin.
            masked: (batch, patches) or (batch, frames, patches) bool, patches whose pixels are hidden from a model of pixels.

        Raises:
            ValueError: for shapes that do not fit, or a state with attention "all", which sees a clip at once.
        """
        config = self.config
        window = read_frames(config.attention)
        single = pixel_values.ndim == 4
        clip = pixel_values.unsqueeze(1) if single else pixel_values
        shape = (config.num_channels, config.image_size, config.image_size)
        if clip.ndim != 5 or tuple(clip.shape[2:]) != shape:
            raise ValueError(
                f"pixels {tuple(pixel_values.shape)} do not fit: expected (batch, [frames,] {', '.join(map(str, shape))})"
            )
        if state is not None and window is None:
            raise ValueError("attention 'all' sees a clip at once and keeps no state; choose 'frame' or 'window:4'")
        if (masked is not None) != (self.hidden is not None):
            raise ValueError("masked patches are for a model of pixels (classes=0), which needs them")
        batch, frames = clip.shape[:2]
        if frames == 0:
            raise ValueError("a call needs one frame at least, got none")
        if state is not None:
            self._check(state, batch)
        before = 0 if state is None else state.frames
        patches = to_patches(clip, config.patch_size).to(self.embed.weight.dtype)
        x = self.embed(patches)
        if self.hidden is not None and masked is not None:
            where = masked.view(batch, frames, -1, 1)
            x = torch.where(where, self.hidden.to(x.dtype), x)
        side = torch.arange(config.image_size // config.patch_size, device=x.device)
        if self.place is not None:
            x = x + self.place.weight
        else:
            rows, columns = (waves(side, config.hidden_size // 2) for _ in range(2))
            both = torch.cat((rows[:, None].expand(-1, len(side), -1), columns[None].expand(len(side), -1, -1)), dim=-1)
            x = x + both.flatten(0, 1).to(x.dtype)
        times = torch.arange(before, before + frames, device=x.device)
        if window is not None:
            times %= window
        x = (x + waves(times, config.hidden_size)[:, None].to(x.dtype)).flatten(1, 2)
        places = self._places(times, frames if window is None else window)
        windows, memories = [], []
        threaded: TensorMemoryState | None = None
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            read, kept = block.attend(x, config.patches, window, None if state is None else state.windows[index])
            x, own = x + read, None
            if self.memory is not None and str(index) in self.memory_layers:
                given = threaded if state is None else state.memories[index]
                added, own = self.memory_layers[str(index)](self.memory, x, given, places)
                x = x + added
                if self.threaded:
                    threaded = self.memory.flush(own)
            windows.append(kept)
            memories.append(own)
            x = x + block.mlp(x)
        y = self.norm(x).unflatten(1, (frames, -1))
        logits = self.head(y.mean(2) if config.classes else y)
        if masked is not None:
            # Pixels are predicted relative to the mean brightness of the visible patches.
            seen = ~masked.view(batch, frames, -1, 1).expand_as(patches)
            logits = logits + (patches * seen).sum((2, 3), keepdim=True) / seen.sum((2, 3), keepdim=True).clamp(min=1)
        new = None if window is None else ViTState(before + frames, tuple(windows), tuple(memories))
        return ViTOutput(logits=logits.squeeze(1) if single else logits, state=new)


def _fits(pair: tuple[Tensor, Tensor], expected: tuple[int, ...]) -> bool:
    """Whether keys and values are (batch, heads, any number of patches, head_dim)."""
    return all(x.ndim == 4 and (*x.shape[:2], x.shape[3]) == expected for x in pair)


def to_patches(clip: Tensor, size: int) -> Tensor:
    """Cut (..., channels, height, width) into (..., patches, channels · size²), row by row."""
    rows = clip.unflatten(-2, (-1, size)).unflatten(-1, (-1, size))
    n = rows.ndim - 5
    # (channels, rows, size, columns, size) to (rows, columns, channels, size, size)
    return rows.permute(*range(n), n + 1, n + 3, n, n + 2, n + 4).flatten(n + 2).flatten(n, n + 1)


def waves(numbers: Tensor, width: int) -> Tensor:
    """Compute sines and cosines of whole numbers, (n,) -> (n, width), with wavelengths up to 10,000."""
    rates = torch.exp(torch.arange(width // 2, device=numbers.device) * (-math.log(10_000) / (width // 2)))
    angles = numbers[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), dim=-1)
