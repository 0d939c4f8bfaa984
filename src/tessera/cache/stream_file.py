"""The streams of a Tensor Memory in the file of a cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tessera.cache_layers.cache_layer import TesseraLayer
from tessera.cache_layers.stream import TENSOR_MEMORY, Groups, Read, Stream, padded
from tessera.files import brief
from tessera.state import MODEL_DTYPES
from tessera.tensor_memory.tensor_memory_config import TensorMemoryConfig
from tessera.tensor_memory.tensor_memory_state import TensorMemoryState

#: The largest number that a layer norm, which every token has passed, can square in float32.
LARGE = 1e18
#: Returns a tensor of the file by its name, or raises that it is missing.
Take = Callable[[str], Tensor]


def named(config: TensorMemoryConfig) -> str:
    """Describe a config for files and messages."""
    return json.dumps(config.to_dict(), sort_keys=True)


def put(stream: Stream, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Add the tensors of a stream to those of a file; returns their description for the header."""

    def put_groups(groups: Groups, name: str) -> list[dict[str, Any]]:
        about = []
        for number, (rows, state) in enumerate(groups):
            # Parts that are read again may share their states.
            for field, tensor in ({} if state is None else state.tensors()).items():
                tensors[f"{name}.{number}.{field}"] = tensor.detach().clone(memory_format=torch.contiguous_format)
            about.append({"rows": rows.tolist(), "begun": state is not None})
        return about

    log = []
    for number, read in enumerate(stream.log):
        name = f"{prefix}.read{number}"
        tensors[f"{name}.x"] = read.x.detach().clone(memory_format=torch.contiguous_format)
        log.append({"start": read.start, "groups": put_groups(read.groups, name)})
    # The tiers know which tokens are real.
    return {
        "recording": stream.recording,
        "behind": stream.behind,
        "log": log,
        "groups": [] if stream.behind else put_groups(stream.groups, prefix),
    }


def fill(layer: TesseraLayer, stream: Stream, dim: int, first: bool, about: Any, prefix: str, take: Take) -> None:
    """Fill an empty stream from a file, and put it on its layer.

    Args:
        layer: layer of the cache, which has been filled.
        stream: see above.
        dim: width of the tokens that the memory reads.
        first: whether no earlier layer has a stream.
        about: entry of the header.
        prefix, take: where the tensors are.

    Raises:
        ValueError: if it is damaged.
    """
    assert stream.config is not None
    batch, seen, config = layer.batch, layer.seen, stream.config
    stream.begin(batch)
    wrong = ValueError(f"the header is damaged: {prefix} is {brief(about)}")
    flags = ("recording", "behind")
    if not isinstance(about, dict) or not all(isinstance(about.get(name), bool) for name in flags):
        raise wrong
    if not isinstance(about.get("log"), list) or (about["behind"] and not about["log"]):
        raise wrong

    def groups(said: Any, name: str) -> Groups:
        if not isinstance(said, list) or not all(isinstance(one, dict) for one in said):
            raise wrong
        found: Groups = []
        for number, one in enumerate(said):
            rows = one.get("rows")
            numbers = isinstance(rows, list) and all(type(row) is int and 0 <= row < batch for row in rows)
            if not numbers or not rows or not isinstance(one.get("begun"), bool):
                raise wrong
            at = f"{name}.{number}"
            state = _state(config, len(rows), dim, at, take) if one["begun"] else None
            found.append((torch.tensor(rows, dtype=torch.long), state))
        if sorted(row for rows, _ in found for row in rows.tolist()) != list(range(batch)):
            raise ValueError(f"the header is damaged: {name} is not of the {batch} rows of the cache")
        return found

    real = torch.zeros(batch, seen, dtype=torch.bool)
    for group in layer.groups:
        for begin, size in group.slots.runs:
            real[torch.tensor(group.rows), begin : begin + size] = True
    end = None
    for number, one in enumerate(about["log"]):
        name = f"{prefix}.read{number}"
        if not isinstance(one, dict) or type(one.get("start")) is not int:
            raise wrong
        x = take(f"{name}.x")
        fits = x.ndim == 3 and x.shape[::2] == (batch, dim) and x.dtype in MODEL_DTYPES and bool((x.abs() < LARGE).all())
        if not fits or not x.shape[1] or one["start"] < 0 or one["start"] != (one["start"] if end is None else end):
            raise ValueError(f"the file is damaged: {name} is {x.dtype} of shape {tuple(x.shape)} behind {one['start']} tokens")
        own = padded(real[:, one["start"] : one["start"] + x.shape[1]].clone())
        stream.log.append(Read(one["start"], groups(one.get("groups"), name), x, own))
        end = stream.log[-1].stop
    if end not in (None, seen):
        raise ValueError(f"the header is damaged: {prefix} keeps tokens up to {end} of {seen}")
    stream.kept = padded(real) if first else None
    stream.groups = stream.log[-1].groups if about["behind"] else groups(about.get("groups"), prefix)
    stream.behind, stream.recording, stream.seen = about["behind"], about["recording"], seen
    begun = sorted(row for rows, state in stream.groups if state is not None for row in rows.tolist())
    if not stream.behind and begun != sorted({*range(batch)} - {*layer.waiting}):
        raise ValueError(f"the header is damaged: rows {brief(begun)} of {prefix} have begun, and {brief(layer.waiting)} wait")
    layer.memory_states.put(TENSOR_MEMORY, stream)


def _state(config: TensorMemoryConfig, rows: int, dim: int, name: str, take: Take) -> TensorMemoryState:
    try:
        state = TensorMemoryState(take(f"{name}.h"), take(f"{name}.c"), take(f"{name}.waiting"))
        state.check()
    except (TypeError, ValueError) as error:
        raise ValueError(f"the file is damaged: {name} is no state: {brief(error)}") from None
    grid, waiting = (rows, config.channels, *config.grid), tuple(state.waiting.shape)
    if tuple(state.h.shape) != grid or waiting[::2] != (rows, dim) or waiting[1] >= config.chunk:
        raise ValueError(f"the file is damaged: {name} is the state of another memory")
    return state
