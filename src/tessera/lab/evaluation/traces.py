"""Traces of a Tensor Memory: the magnitude in each cell after every step, and where tokens write and read.

`follow` goes through a stream with one memory, `follow_backbone` and `follow_vit` with every layer of a
`tessera.lab.models.backbones.Backbone` or of a `tessera.models.ViT` that has one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tessera.lab.models.backbones import OPEN_AT_FIRST, Backbone
from tessera.lab.models.vit import ViT
from tessera.tensor_memory import TensorMemory, TensorMemoryState


@dataclass(frozen=True, eq=False)
class Trace:
    """The trace of one sequence in one layer.

    Attributes:
        size: (steps + 1, *grid), |h| over the channels of each cell, at the beginning and after every step.
        written: (steps, n), places from -1 to 1, (x, y, z).
        sigma: (steps,), standard deviations of writes.
        read: (steps, reads, n), places.
        gate: the layer's gate, from 0 to 1; None: there is no layer.
        gate_at_first: before training.
    """

    size: Tensor
    written: Tensor
    sigma: Tensor
    read: Tensor
    gate: float | None = None
    gate_at_first: float | None = None

    @property
    def steps(self) -> int:
        """Number of steps of the recurrence."""
        return len(self.written)


def sizes(state: TensorMemoryState, row: int = 0) -> Tensor:
    """Compute |h| over the channels of each cell of one sequence, (*grid).

    Raises:
        ValueError: if there is no such sequence.
    """
    if not 0 <= row < len(state.h):
        raise ValueError(f"the state is of {len(state.h)} sequences; there is no sequence {row}")
    return state.h[row].detach().float().norm(dim=0).cpu()


@torch.no_grad()
def follow(
    memory: TensorMemory,
    x: Tensor,
    gate: float | None = None,
    state: TensorMemoryState | None = None,
    places: Tensor | None = None,
) -> Trace:
    """Trace a memory on a stream, one step at a time.

    Args:
        memory: that is written and read.
        x: (tokens, dim); what is left of the last chunk is not written.
        gate: the layer's gate.
        state: state of one sequence without a partial chunk; None: the stream begins.
        places: (tokens, n), of an anchored memory.

    Raises:
        ValueError: if there is not one whole chunk, or the tokens do not fit.
    """
    chunk = memory.config.chunk
    if memory.config.anchored and places is None:
        raise ValueError("a stream comes without places, and this memory is anchored")
    if x.ndim != 2 or x.shape[1] != memory.dim:
        raise ValueError(f"a stream is (tokens, {memory.dim}) for this memory, got {tuple(x.shape)}")
    steps = len(x) // chunk
    if steps == 0:
        raise ValueError(f"a stream of {len(x)} tokens has no whole chunk of {chunk}")
    device = memory.gates_bias.device
    tokens = x[: steps * chunk].float().to(device)[None]
    chunks = tokens.unflatten(1, (steps, chunk))
    at = None if places is None else places[: steps * chunk].float().to(device).unflatten(0, (steps, chunk))
    read = memory.coordinates(chunks, None if at is None else at[None])
    writes = memory.writes(chunks, None if at is None else at[None], read)
    state = memory.initial_state(1) if state is None else state
    found = [sizes(state)]
    for step in range(steps):
        _, state = memory(chunks[:, step], state, None if at is None else at[step])
        found.append(sizes(state))
    return Trace(torch.stack(found), writes.at[0].cpu(), writes.sigma[0].cpu(), read[0].cpu(), gate)


def follow_backbone(model: Backbone, x: Tensor) -> list[Trace]:
    """Trace the memory of every layer on one sequence.

    Args:
        model: with a memory.
        x: (tokens, features).

    Raises:
        ValueError: if it has none.
    """
    if model.memory is None:
        raise ValueError(f"a backbone of kind {model.config.kind!r} has no memory to look at")
    return _layers(partial(model, x[None]), model.memory, [float(gate) for gate in model.gates()], OPEN_AT_FIRST)


def follow_vit(model: ViT, clip: Tensor) -> list[Trace]:
    """Trace the memory of every layer that has one on one clip, patch by patch.

    Args:
        model: with a memory.
        clip: (frames, channels, size, size).

    Raises:
        ValueError: if it has none, or the clip does not fit.
    """
    if model.memory is None:
        raise ValueError("this ViT has no memory to look at")
    layers: Any = model.memory_layers.values()
    run: Any = model
    gates = [float(layer.gate_logit.detach().sigmoid()) for layer in layers]
    at_first = float(torch.tensor(float(model.memory.config.gate_init or 0)).sigmoid())
    # All patches are visible to a model of pixels.
    seen = {"masked": torch.zeros(1, len(clip), model.config.patches, dtype=torch.bool)} if model.config.classes == 0 else {}
    return _layers(partial(run, clip[None], **seen), model.memory, gates, at_first)


def _layers(run: Callable[[], Any], memory: TensorMemory, gates: list[float], at_first: float) -> list[Trace]:
    """Run a model on one sequence, and follow its memory in every layer, each with a gate. Between layers, what waits of a
    chunk may be written by itself; such calls are none of a layer."""
    given: list[tuple[Tensor, TensorMemoryState | None, Tensor | None]] = []
    tokens = 0

    def note(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        nonlocal tokens
        here, state, places = (*arguments, None, None)[:3]
        tokens = max(tokens, here.shape[1])
        if here.shape[1] == tokens:
            given.append((here[0], state, places[0] if places is not None and places.ndim == 3 else places))

    hook = memory.register_forward_pre_hook(note)
    try:
        with torch.no_grad():
            run()
    finally:
        hook.remove()
    return [
        replace(follow(memory, own, gate, state, places), gate_at_first=at_first)
        for (own, state, places), gate in zip(given, gates, strict=True)
    ]


def read_stream(path: str | os.PathLike[str]) -> Tensor:
    """Read tokens (tokens, dim) from a .npy or a .safetensors file: of the latter the tensor ``x``, or the only one.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no stream.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no stream at {path}")
    named: dict[str, Tensor] = {}
    try:
        if path.suffix == ".npy":
            named["x"] = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            named = load_file(path)
    except (SafetensorError, TypeError, ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} holds no stream; it must be a .npy or a .safetensors file") from error
    if "x" not in named and len(named) != 1:
        raise ValueError(f"{path} holds {', '.join(named) or 'nothing'}; a stream is the tensor x, or the only one")
    x = named["x"] if "x" in named else next(iter(named.values()))
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(
            f"{path} holds {x.dtype} of shape {tuple(x.shape)}; a stream is (tokens, dim) of floating-point numbers"
        )
    return x.float()
