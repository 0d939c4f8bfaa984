"""A cache in a safetensors file: the tensors of every tier, and a header of plain JSON that says what they are."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tessera.associative import TensorCacheState
from tessera.cache.lane import Lane
from tessera.cache.masks import Runs
from tessera.cache.spec import BLOCK
from tessera.cache.tiers import PAGE, ExactTier
from tessera.codecs import Packed
from tessera.files import atomic_path

if TYPE_CHECKING:
    from tessera.cache.layer import TesseraLayer

#: Rows, kv_heads and head_dim.
Size = tuple[int, int, int]

#: Changes when a reader of the older form would misread the newer. The first form knew padding before the first token only.
FORMAT = 2


def save(layers: Sequence[TesseraLayer], about: dict[str, str], path: str | os.PathLike[str]) -> None:
    """Write the layers. about: text that `Stored.text` gives back."""
    tensors: dict[str, Tensor] = {}
    described = []
    for layer in layers:
        layer.settle_calls()
        lanes = [_put_lane(lane, layer.seen, f"{layer.index}.{i}", tensors) for i, lane in enumerate(layer.lanes)]
        described.append(
            {
                "shape": list(layer.shape),
                "sliding": layer.sliding,
                "seen": layer.seen,
                "batch": layer.batch,
                "waiting": layer.waiting,
                "dtype": None if layer.dtype is None else str(layer.dtype).removeprefix("torch."),
                "lanes": lanes,
            }
        )
    header = {"tessera_cache": json.dumps({"format": FORMAT, **about, "layers": described})}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, header)


def _put_lane(lane: Lane, seen: int, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    for name, tier in (("sink", lane.sink), ("recent", lane.recent)):
        if tier.tokens:
            tensors[f"{prefix}.{name}.keys"] = tier.keys.contiguous()
            tensors[f"{prefix}.{name}.values"] = tier.values.contiguous()
    pages = []
    for number, page in enumerate(lane.packed.pages if lane.packed is not None else ()):
        for role, packed in zip(("keys", "values"), page, strict=True):
            for field, tensor in packed.tensors.items():
                tensors[f"{prefix}.page{number}.{role}.{field}"] = tensor.contiguous()
        pages.append([packed.metadata() for packed in page])
    if lane.memory is not None:
        for name, tensor in ({} if lane.memory.state is None else lane.memory.state.tensors()).items():
            tensors[f"{prefix}.tc.{name}"] = tensor.contiguous()
        if lane.memory.positions is not None:
            tensors[f"{prefix}.positions"] = lane.memory.positions.contiguous()
    return {
        "rows": lane.rows,
        "slots": lane.slots.runs,
        "before": lane.before,
        # What follows from the rest is written too, so that a damaged number is found.
        "padding": seen - lane.before - lane.length,
        "gaps": [size for _, size in lane.slots.between(0, seen).runs],
        "dropped": lane.dropped,
        "pages": pages,
    }


class Stored:
    """An open file, its header read and found to be of the right form."""

    def __init__(self, file: Any, header: dict[str, Any]) -> None:
        self._file = file
        self._header = header
        self._left = set(file.keys())

    def text(self, key: str) -> str:
        """What was saved about the cache."""
        return _typed(self._header, key, str)

    def fill(self, layers: Sequence[TesseraLayer]) -> None:
        """Put what was saved into empty layers.

        Raises:
            ValueError: if the file was made for another model, or is damaged.
        """
        described = _typed(self._header, "layers", list)
        if len(described) != len(layers):
            raise ValueError(f"this cache was saved from a model of {len(described)} layers; yours has {len(layers)}")
        for layer, about in zip(layers, described, strict=True):
            if not isinstance(about, dict):
                raise ValueError("the header is damaged: a layer is no table")
            if (about.get("shape"), about.get("sliding")) != (list(layer.shape), layer.sliding):
                raise ValueError(
                    f"this cache was saved from a model whose layer {layer.index} has (kv_heads, head_dim) = "
                    f"{about.get('shape')} and sliding window {about.get('sliding')}; "
                    f"yours has {list(layer.shape)} and {layer.sliding}"
                )
            self._fill(layer, about)
        if self._left:
            raise ValueError(f"the file is damaged: its header does not mention {sorted(self._left)[:3]}")

    def _fill(self, layer: TesseraLayer, about: dict[str, Any]) -> None:
        layer.seen = _count(about, "seen")
        layer.batch = _count(about, "batch")
        layer.waiting = _rows(about, "waiting", layer.batch)
        if about.get("dtype") is None:
            if layer.seen:
                raise ValueError("the header is damaged: tokens without a dtype")
            return
        dtype = getattr(torch, _typed(about, "dtype", str), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"the header is damaged: dtype {about.get('dtype')!r}")
        layer.dtype, layer.device, layer.is_initialized = dtype, torch.device("cpu"), True
        for number, entry in enumerate(_typed(about, "lanes", list)):
            if not isinstance(entry, dict):
                raise ValueError("the header is damaged: a lane is no table")
            layer.lanes.append(self._lane(layer, entry, f"{layer.index}.{number}", dtype))
        rows = sorted([*layer.waiting, *(row for lane in layer.lanes for row in lane.rows)])
        # The lengths first: a damaged header may name a batch that no list can hold.
        if len(rows) != layer.batch or rows != list(range(layer.batch)):
            raise ValueError(f"the header is damaged: layer {layer.index} holds rows {rows} of {layer.batch}")

    def _lane(self, layer: TesseraLayer, about: dict[str, Any], prefix: str, dtype: torch.dtype) -> Lane:
        older = self._header["format"] == 1
        lane = Lane(layer.policy, layer.index, _rows(about, "rows", layer.batch), 0 if older else _count(about, "before"))
        lane.slots = Runs(((_count(about, "pad"), _count(about, "length")),)) if older else _slots(about, layer.seen)
        lane.length, lane.dropped = lane.slots.count, _count(about, "dropped")
        size: Size = (len(lane.rows), *layer.shape)
        self._exact(lane.sink, f"{prefix}.sink", size, dtype)
        self._exact(lane.recent, f"{prefix}.recent", size, dtype)
        pages = _typed(about, "pages", list)
        if pages and lane.packed is None:
            raise ValueError("the header is damaged: packed tokens without a codec")
        for number, page in enumerate(pages):
            assert lane.packed is not None
            if not isinstance(page, list) or len(page) != 2 or not all(isinstance(one, dict) for one in page):
                raise ValueError("the header is damaged: a page is no pair of tables")
            keys, values = (
                self._packed(metadata, f"{prefix}.page{number}.{role}.", lane, role, size, dtype)
                for metadata, role in zip(page, ("keys", "values"), strict=True)
            )
            if keys.tokens != values.tokens:
                raise ValueError(f"the header is damaged: page {number} has {keys.tokens} keys and {values.tokens} values")
            lane.packed.put([*lane.packed.pages, (keys, values)])
        if lane.memory is not None:
            lane.memory.state = self._memory(f"{prefix}.tc.", size)
            lane.memory.written = lane.length if older else _written(lane)
            if older or f"{prefix}.positions" in self._left:
                lane.memory.positions = self._positions(lane, f"{prefix}.positions", older)
        held = lane.sink.tokens + lane.dropped + lane.held["packed"] + lane.recent.tokens
        sink = min(lane.policy.sink, lane.length)
        padding = _count(about, "pad" if older else "padding")
        if not older and about.get("gaps") != [size for _, size in lane.slots.between(0, layer.seen).runs]:
            raise ValueError(f"the header is damaged: 'gaps' is {about.get('gaps')!r} between {about.get('slots')!r}")
        fits = lane.slots.before(layer.seen) == lane.length and layer.seen == lane.length + lane.before + padding
        if held != lane.length or not lane.length or not fits or lane.sink.tokens != sink:
            raise ValueError(f"the file is damaged: layer {layer.index} should hold {lane.length} tokens and holds {held}")
        return lane

    def _exact(self, tier: ExactTier, prefix: str, size: Size, dtype: torch.dtype) -> None:
        if f"{prefix}.keys" not in self._left:
            return
        keys, values = self._take(f"{prefix}.keys"), self._take(f"{prefix}.values")
        good = (size[0], size[1], keys.shape[2] if keys.ndim == 4 else -1, size[2])
        if tuple(keys.shape) != good or keys.shape != values.shape or {keys.dtype, values.dtype} != {dtype}:
            raise ValueError(f"the file is damaged: {prefix} has shapes {tuple(keys.shape)} and {tuple(values.shape)}")
        tier.append(keys, values)

    def _packed(self, metadata: dict[str, Any], prefix: str, lane: Lane, role: str, size: Size, dtype: torch.dtype) -> Packed:
        assert lane.packed is not None
        tensors = {name[len(prefix) :]: self._take(name) for name in sorted(self._left) if name.startswith(prefix)}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError(f"the header is damaged: {metadata} describes no {role}")
        packed = Packed.from_parts(metadata, tensors, lane.packed.codec)
        place = (packed.role, packed.layer, packed.offset, packed.dtype)
        if place != (role[:-1], lane.layer, 0, dtype):
            raise ValueError(f"the header is damaged: {packed.describe()} in place of {role} of layer {lane.layer}")
        good = (size[0], size[1], packed.tokens, size[2])
        if packed.shape != good or packed.tokens % BLOCK or not 0 < packed.tokens <= PAGE:
            raise ValueError(f"the header is damaged: {packed.describe()}")
        return packed

    def _memory(self, prefix: str, size: Size) -> TensorCacheState | None:
        found = {name[len(prefix) :]: self._take(name) for name in sorted(self._left) if name.startswith(prefix)}
        if not found:
            return None
        try:
            state = TensorCacheState(**{"slow": None, "z": None, **found})  # type: ignore[arg-type]
        except TypeError:
            raise ValueError(f"the file is damaged: {prefix} holds {sorted(found)}") from None
        shape = tuple(state.a.shape)
        if state.a.dtype != torch.float32 or len(shape) != 4 or (shape[0], *shape[2:]) != (size[0], size[2], size[2]):
            raise ValueError(f"the file is damaged: {prefix}a is {state.a.dtype} of shape {shape}")
        if any(tensor.shape[:1] != state.a.shape[:1] or not tensor.isfinite().all() for tensor in state.tensors().values()):
            raise ValueError(f"the file is damaged: {prefix} holds tensors that do not fit together")
        return state

    def _positions(self, lane: Lane, name: str, older: bool) -> Tensor:
        if older:
            # The first form took a token's place for its position.
            places = torch.arange(lane.length - lane.recent.tokens, lane.length)
            return places.expand(len(lane.rows), -1)
        found = self._take(name)
        if found.dtype != torch.long or found.shape[:1] != (len(lane.rows),) or found.ndim != 2 or (found < 0).any():
            raise ValueError(f"the file is damaged: {name} is {found.dtype} of shape {tuple(found.shape)}")
        if found.shape[1] != lane.recent.tokens:
            raise ValueError(f"the file is damaged: {name} is of {found.shape[1]} tokens, not {lane.recent.tokens}")
        return found

    def _take(self, name: str) -> Tensor:
        if name not in self._left:
            raise ValueError(f"the file is damaged: it lacks {name!r}")
        self._left.remove(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[Stored]:
    """Open what `save` wrote.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is something else.
    """
    try:
        file = safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)} is no saved cache: {error}") from None
    with file:
        text = (file.metadata() or {}).get("tessera_cache")
        if text is None:
            raise ValueError(f"{os.fspath(path)} is no saved cache: it has no 'tessera_cache' header")
        try:
            header = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{os.fspath(path)}: the header is damaged: {error}") from None
        if not isinstance(header, dict) or header.get("format") not in range(1, FORMAT + 1):
            found = header.get("format") if isinstance(header, dict) else None
            raise ValueError(f"{os.fspath(path)} has format {found!r}; this version reads formats 1 to {FORMAT}")
        try:
            yield Stored(file, header)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from None


def _typed(table: dict[str, Any], key: str, kind: type) -> Any:
    value = table.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"the header is damaged: {key!r} is {value!r}")
    return value


def _count(table: dict[str, Any], key: str) -> int:
    value: int = _typed(table, key, int)
    if value < 0:
        raise ValueError(f"the header is damaged: {key!r} is {value}")
    return value


def _written(lane: Lane) -> int:
    """Up to which query pairs have been written, which the state knows."""
    if lane.memory is None or lane.memory.state is None:
        return 0
    found: list[int] = lane.memory.state.seen.unique().tolist()
    if len(found) != 1 or not 0 <= found[0] <= lane.length:
        raise ValueError(f"the file is damaged: a memory has been written to up to {found} of {lane.length} tokens")
    return found[0]


def _slots(table: dict[str, Any], seen: int) -> Runs:
    runs: list[Any] = _typed(table, "slots", list)
    end = 0
    for run in runs:
        if not isinstance(run, list) or [type(number) for number in run] != [int, int]:
            raise ValueError(f"the header is damaged: a run of slots is {run!r}")
        if run[0] < end or run[1] < 1 or sum(run) > seen:
            raise ValueError(f"the header is damaged: slots {run!r} behind {end} of {seen}")
        end = sum(run)
    return Runs(tuple((first, size) for first, size in runs))


def _rows(table: dict[str, Any], key: str, batch: int) -> list[int]:
    rows: list[int] = _typed(table, key, list)
    if any(not isinstance(row, int) or isinstance(row, bool) or not 0 <= row < batch for row in rows):
        raise ValueError(f"the header is damaged: {key!r} is {rows!r} in a batch of {batch}")
    if rows != sorted(set(rows)):
        raise ValueError(f"the header is damaged: {key!r} is {rows!r}")
    return rows
