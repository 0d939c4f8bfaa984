"""The format of a saved cache: a safetensors file with the tensors of every tier and a header of plain JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tessera.cache import stream_file
from tessera.cache_layers.group import SequenceGroup
from tessera.cache_layers.masks import Runs
from tessera.cache_layers.stream import TENSOR_MEMORY, Stream
from tessera.codecs import Codec, Packed
from tessera.codecs.channel_stats import KeyStats
from tessera.files import WHOLE, TensorFile, atomic_path, brief, open_tensors, read_json
from tessera.tensor_cache import TensorCacheConfig, TensorCacheState
from tessera.tensor_memory.tensor_memory_config import TensorMemoryConfig
from tessera.tiers import BLOCK, PAGE, ExactTier, QuantizedTier
from tessera.tiers.learning import LEARN
from tessera.tiers.policy import RetentionPolicy

if TYPE_CHECKING:
    from tessera.cache_layers.cache_layer import TesseraLayer

#: Rows, kv_heads and head_dim.
Size = tuple[int, int, int]
#: Of keys and of values.
Dtypes = tuple[torch.dtype, torch.dtype]

#: Changes when a reader of the older form would misread the newer. The first form knew padding before the first token only, the
#: first two no statistics of keys, the first three nothing of a Tensor Memory.
FORMAT = 4
#: No cache has seen more tokens, or batches of more rows.
MOST = 1 << 40
#: What keys and values may be in, by the names that headers use.
DTYPES = {str(x).removeprefix("torch."): x for x in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


def save(
    layers: Sequence[TesseraLayer],
    about: dict[str, str],
    path: str | os.PathLike[str],
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write the layers. about: text that `Stored.text` gives back; notes: more for the header, which is not read here."""
    tensors: dict[str, Tensor] = {}
    described = []
    for layer in layers:
        layer.flush_staged()
        groups = [_put_group(group, layer.seen, f"{layer.index}.{i}", tensors) for i, group in enumerate(layer.groups)]
        dtype, value_dtype = held_dtypes(layer)
        about_layer: dict[str, Any] = {
            "shape": list(layer.shape),
            "sliding": layer.sliding,
            "seen": layer.seen,
            "batch": layer.batch,
            "waiting": layer.waiting,
            "dtype": str(dtype).removeprefix("torch.") if layer.is_initialized else None,
            "lanes": groups,
        }
        if layer.policy.stats is not None:
            tensors[f"{layer.index}.stats"] = layer.policy.stats.sizes.clone()  # layers may share one
        if layer.is_initialized and value_dtype != dtype:
            about_layer["value_dtype"] = str(value_dtype).removeprefix("torch.")
        stream = _stream(layer)
        if stream is not None:
            about_layer["tensor_memory"] = stream_file.put(stream, f"{layer.index}.tm", tensors)
        described.append(about_layer)
    # Files that an older version can read are given its number.
    number = FORMAT if "tensor_memory" in about else FORMAT - 1
    header = {**(notes or {}), "tessera_cache": json.dumps({"format": number, **about, "layers": described})}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, header)


def _stream(layer: TesseraLayer) -> Stream | None:
    """The stream of a Tensor Memory on a layer, if it is still in use."""
    found = layer.memory_states.get(TENSOR_MEMORY)
    return found if isinstance(found, Stream) and found.seen == layer.seen > 0 else None


def read_along(layers: Sequence[TesseraLayer]) -> TensorMemoryConfig | None:
    """Return the config of the Tensor Memory that is attached to the layers' model, or None."""
    return next((stream.config for stream in map(_stream, layers) if stream is not None), None)


def held_dtypes(layer: TesseraLayer) -> tuple[torch.dtype | None, torch.dtype | None]:
    """Return the widest dtypes of keys and of values that a layer holds, or those it was given last where it holds none."""
    widest: list[torch.dtype | None] = []
    for role, rest in enumerate((layer.dtype, layer.value_dtype)):
        held = [
            *(
                tier.buffers()[role].dtype
                for group in layer.groups
                for tier in (group.chain.sink, group.chain.recent)
                if tier.tokens
            ),
            *(page[role].dtype for group in layer.groups for tier in group.chain.quantized for page in tier.pages),
        ]
        widest.append(reduce(torch.promote_types, held) if held else rest)
    return widest[0], widest[1]


def _put_group(group: SequenceGroup, seen: int, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    for name, tier in (("sink", group.chain.sink), ("recent", group.chain.recent)):
        if tier.tokens:
            tensors[f"{prefix}.{name}.keys"] = tier.keys.contiguous()
            tensors[f"{prefix}.{name}.values"] = tier.values.contiguous()
    chain: list[list[list[dict[str, str]]]] = []
    for packed_tier in group.chain.quantized:
        described = []
        for number, page in enumerate(packed_tier.pages):
            name = _page(prefix, len(chain), number)
            for role, packed in zip(("keys", "values"), page, strict=True):
                for field, tensor in packed.tensors.items():
                    tensors[f"{name}.{role}.{field}"] = tensor.contiguous()
            described.append([packed.metadata() for packed in page])
        chain.append(described)
    for number, (_, added) in enumerate(group.chain.others):
        for name, tensor in added.tensors().items():
            tensors[f"{prefix}.other{number}.{name}"] = tensor.contiguous()
    matrix = group.chain.tensor_cache
    if matrix is not None:
        for name, tensor in ({} if matrix.state is None else matrix.state.tensors()).items():
            tensors[f"{prefix}.tc.{name}"] = tensor.contiguous()
        if matrix.positions is not None:
            tensors[f"{prefix}.positions"] = matrix.positions.contiguous()
    stats = "none"
    if group.chain.learning is not None:
        stats = "learning"
        if group.chain.learning.squares is not None:
            tensors[f"{prefix}.learning"] = group.chain.learning.squares.contiguous()
    elif group.chain.stats is not None:
        stats = "known"
        tensors[f"{prefix}.stats"] = group.chain.stats.sizes.contiguous()
    return {
        "stats": stats,
        "rows": group.rows,
        "slots": group.slots.runs,
        "before": group.before,
        # What follows from the rest is written too, so that a damaged number is found.
        "padding": seen - group.before - group.length,
        "gaps": [size for _, size in group.slots.between(0, seen).runs],
        "dropped": group.chain.dropped,
        "pages": chain[0] if chain else [],
        **({"older": chain[1:]} if len(chain) > 1 else {}),
    }


def _page(prefix: str, tier: int, number: int) -> str:
    """Name the tensors of a page, of the first compressed tier or of one behind it."""
    return f"{prefix}.page{number}" if not tier else f"{prefix}.tier{tier}.page{number}"


class Stored:
    """An open file whose header has been read and checked."""

    def __init__(self, file: TensorFile, header: dict[str, Any]) -> None:
        self._file = file
        self._header = header
        self._left = set(file.names)

    def text(self, key: str, default: str | None = None) -> str:
        """Return an entry saved about the cache, or `default` where there is none."""
        return default if default is not None and key not in self._header else _typed(self._header, key, str)

    @property
    def tensor_memory(self) -> str:
        """Return the config of the Tensor Memory attached when the cache was saved, as JSON; empty if there was none."""
        return self.text("tensor_memory", "")

    def fill(self, layers: Sequence[TesseraLayer], streams: Mapping[int, tuple[Stream, int, bool]] | None = None) -> None:
        """Fill empty layers with what was saved.

        Args:
            layers: layers of the cache.
            streams: streams of the Tensor Memory that had read along, by layer: see `stream_file.fill`.

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
                    f"{brief(about.get('shape'))} and sliding window {brief(about.get('sliding'))}; "
                    f"yours has {list(layer.shape)} and {layer.sliding}"
                )
            self._fill(layer, about)
            self._read_along(layer, about.get("tensor_memory"), (streams or {}).get(layer.index))
        if len({(layer.seen, layer.batch) for layer in layers}) > 1:
            raise ValueError("the header is damaged: its layers have seen different numbers of tokens or rows")
        if self._left:
            raise ValueError(f"the file is damaged: its header does not mention {brief(sorted(self._left)[:3])}")

    def _read_along(self, layer: TesseraLayer, about: Any, given: tuple[Stream, int, bool] | None) -> None:
        if (about is None) != (given is None or not self.tensor_memory):
            raise ValueError(
                f"the header is damaged: layer {layer.index} "
                + ("lacks" if about is None else "has")
                + " what a Tensor Memory has read, which its model's has there"
                + ("" if about is None else " not")
            )
        if given is not None and about is not None:
            stream_file.fill(layer, *given, about, f"{layer.index}.tm", self._take)

    def _fill(self, layer: TesseraLayer, about: dict[str, Any]) -> None:
        layer.seen = _count(about, "seen")
        layer.batch = _count(about, "batch")
        layer.waiting = _rows(about, "waiting", layer.batch)
        if f"{layer.index}.stats" in self._left:
            layer.policy = replace(layer.policy, stats=self._stats(f"{layer.index}.stats", layer, 1))
        groups = _typed(about, "lanes", list)
        if not layer.batch:
            # Nothing has been given to it, or it was reset.
            if layer.seen or groups:
                raise ValueError("the header is damaged: tokens without rows")
            return
        dtypes = _dtype(about, "dtype"), _dtype(about, "value_dtype" if "value_dtype" in about else "dtype")
        layer.dtype, layer.value_dtype = dtypes
        layer.device = layer.held_on = torch.device("cpu")
        layer.is_initialized = True
        for number, entry in enumerate(groups):
            if not isinstance(entry, dict):
                raise ValueError("the header is damaged: a group is no table")
            layer.groups.append(self._group(layer, entry, f"{layer.index}.{number}", dtypes))
        rows = sorted([*layer.waiting, *(row for group in layer.groups for row in group.rows)])
        # The lengths first: a damaged header may name a batch that no list can hold.
        if len(rows) != layer.batch or rows != list(range(layer.batch)):
            raise ValueError(f"the header is damaged: layer {layer.index} holds rows {brief(rows)} of {layer.batch}")
        if held_dtypes(layer) != dtypes:
            raise ValueError(f"the file is damaged: layer {layer.index} holds {held_dtypes(layer)} and not {dtypes}")

    def _group(self, layer: TesseraLayer, about: dict[str, Any], prefix: str, dtypes: Dtypes) -> SequenceGroup:
        older = self._header["format"] == 1
        group = SequenceGroup(
            layer.policy, layer.index, _rows(about, "rows", layer.batch), 0 if older else _count(about, "before")
        )
        group.slots = Runs(((_count(about, "pad"), _count(about, "length")),)) if older else _slots(about, layer.seen)
        group.length, group.chain.dropped = group.slots.count, _count(about, "dropped")
        if not group.rows or not group.length:
            raise ValueError("the header is damaged: a group without rows or tokens")
        self._learned(group, layer, prefix, "none" if self._header["format"] < 3 else _typed(about, "stats", str))
        size: Size = (len(group.rows), *layer.shape)
        self._exact(group.chain.sink, f"{prefix}.sink", size, dtypes)
        self._exact(group.chain.recent, f"{prefix}.recent", size, dtypes)
        described = [_typed(about, "pages", list), *(_typed(about, "older", list) if "older" in about else [])]
        if any(described) and (not group.chain.quantized or group.chain.learning is not None):
            raise ValueError("the header is damaged: packed tokens without a codec, or before their statistics are known")
        tiers = group.chain.quantized
        if len(described) != max(1, len(tiers)):
            raise ValueError(f"the header is damaged: {len(described)} tiers of packed tokens, not {len(tiers)}")
        for number, (tier, pages) in enumerate(zip(tiers, described, strict=False)):
            self._pages(group, tier, pages, prefix, number, size, dtypes)
        for number, (_, added) in enumerate(group.chain.others):
            start = f"{prefix}.other{number}."
            found = {name[len(start) :]: self._take(name) for name in sorted(self._left) if name.startswith(start)}
            added.restore(found, *size)
        matrix = group.chain.tensor_cache
        if matrix is not None:
            matrix.state = self._memory(f"{prefix}.tc.", size)
            matrix.written = group.length if older or matrix.window is None else _written(group)
            if older or f"{prefix}.positions" in self._left:
                matrix.positions = self._positions(group, f"{prefix}.positions", older)
        count = group.chain.dropped + sum(group.chain.held.values())
        sink = min(group.policy.sink, group.length)
        padding = _count(about, "pad" if older else "padding")
        gaps = [size for _, size in group.slots.between(0, layer.seen).runs]
        if not older and about.get("gaps") != gaps:
            raise ValueError(f"the header is damaged: 'gaps' is {brief(about.get('gaps'))}, not {brief(gaps)}")
        fits = group.slots.before(layer.seen) == group.length and layer.seen == group.length + group.before + padding
        if count != group.length or not fits or group.chain.sink.tokens != sink:
            raise ValueError(f"the file is damaged: layer {layer.index} should hold {group.length} tokens and holds {count}")
        if group.chain.dropped > _may_drop(group.policy, group.length, sink):
            raise ValueError(f"the file is damaged: layer {layer.index} lacks tokens that its next query would see")
        if matrix is not None and matrix.state is None and group.chain.dropped:
            raise ValueError(f"the file is damaged: layer {layer.index} lacks the memory of what it dropped")
        return group

    def _stats(self, name: str, layer: TesseraLayer, rows: int) -> KeyStats:
        stats = KeyStats(self._take(name))
        try:
            stats.check(*layer.shape)
        except ValueError as error:
            raise ValueError(f"the file is damaged: {name}: {error}") from None
        if not layer.policy.weighs:
            raise ValueError(f"the file is damaged: {name} is of a layer whose codec uses no statistics")
        if len(stats.sizes) != rows:
            raise ValueError(f"the file is damaged: {name} is of {len(stats.sizes)} rows, not {rows}")
        return stats

    def _learned(self, group: SequenceGroup, layer: TesseraLayer, prefix: str, said: str) -> None:
        """Read the statistics by which a group scales its keys; files of the first two formats have none."""
        learning, group.chain.learning = group.chain.learning, None
        group.chain.stats = None
        if said == "known" and group.chain.quantized:
            group.chain.stats = self._stats(f"{prefix}.stats", layer, len(group.rows))
        elif said == "learning" and learning is not None:
            squares = self._take(f"{prefix}.learning")
            good = (len(group.rows), layer.shape[0], min(LEARN, group.length), layer.shape[1])
            if tuple(squares.shape) != good or squares.dtype != torch.float32 or not squares.isfinite().all():
                raise ValueError(f"the file is damaged: {prefix}.learning is {squares.dtype} of shape {tuple(squares.shape)}")
            learning.squares, group.chain.learning = squares, learning
        elif said != "none":
            raise ValueError(f"the header is damaged: 'stats' is {brief(said)}")

    def _pages(
        self, group: SequenceGroup, tier: QuantizedTier, pages: Any, prefix: str, number: int, size: Size, dtypes: Dtypes
    ) -> None:
        if not isinstance(pages, list):
            raise ValueError("the header is damaged: a tier of packed tokens is no list")
        held = []
        for i, page in enumerate(pages):
            if not isinstance(page, list) or len(page) != 2 or not all(isinstance(one, dict) for one in page):
                raise ValueError("the header is damaged: a page is no pair of tables")
            keys, values = (
                self._packed(metadata, f"{_page(prefix, number, i)}.{role}.", group, tier.codec, role, size, dtype)
                for metadata, role, dtype in zip(page, ("keys", "values"), dtypes, strict=True)
            )
            if keys.tokens != values.tokens:
                raise ValueError(f"the header is damaged: page {i} has {keys.tokens} keys and {values.tokens} values")
            held.append((keys, values))
        if held:
            tier.put(held)

    def _exact(self, tier: ExactTier, prefix: str, size: Size, dtypes: Dtypes) -> None:
        if f"{prefix}.keys" not in self._left:
            return
        keys, values = self._take(f"{prefix}.keys"), self._take(f"{prefix}.values")
        good = (size[0], size[1], keys.shape[2] if keys.ndim == 4 else -1, size[2])
        if tuple(keys.shape) != good or keys.shape != values.shape:
            raise ValueError(f"the file is damaged: {prefix} has shapes {tuple(keys.shape)} and {tuple(values.shape)}")
        for tensor, dtype in zip((keys, values), dtypes, strict=True):
            if not _within(tensor.dtype, dtype):
                raise ValueError(f"the file is damaged: {prefix} is in {tensor.dtype} where the header says {dtype}")
        tier.append(keys, values)

    def _packed(
        self,
        metadata: dict[str, Any],
        prefix: str,
        group: SequenceGroup,
        codec: Codec,
        role: str,
        size: Size,
        dtype: torch.dtype,
    ) -> Packed:
        tensors = {name[len(prefix) :]: self._take(name) for name in sorted(self._left) if name.startswith(prefix)}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError(f"the header is damaged: {brief(metadata)} describes no {role}")
        packed = Packed.from_parts(metadata, tensors, codec)
        place = (packed.role, packed.layer, packed.offset)
        if place != (role[:-1], group.layer, 0) or not _within(packed.dtype, dtype):
            raise ValueError(f"the header is damaged: {packed.describe()} in place of {role} of layer {group.layer}")
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
            state.check()
        except (TypeError, ValueError) as error:
            raise ValueError(f"the file is damaged: {prefix[:-1]} is no state: {brief(error)}") from None
        # The cache was made for the same memory, or this would not be read.
        config = TensorCacheConfig.from_dict(read_json(self.text("memory")))
        rows, heads, dim = size
        good = (rows, heads * config.slots, dim, dim), (rows, heads, 0, dim), config.slow is None, not config.normalise_read
        if (tuple(state.a.shape), tuple(state.k.shape), state.slow is None, state.z is None) != good:
            raise ValueError(f"the file is damaged: {prefix[:-1]} is the state of another memory")
        return state

    def _positions(self, group: SequenceGroup, name: str, older: bool) -> Tensor:
        if older:
            # The first form took a token's place for its position.
            places = torch.arange(group.length - group.chain.recent.tokens, group.length)
            return places.expand(len(group.rows), -1)
        found = self._take(name)
        if found.dtype != torch.long or found.shape[:1] != (len(group.rows),) or found.ndim != 2 or (found < 0).any():
            raise ValueError(f"the file is damaged: {name} is {found.dtype} of shape {tuple(found.shape)}")
        held = group.chain.recent.tokens + sum(tier.tokens for tier in group.chain.aging)
        if found.shape[1] != held:
            raise ValueError(f"the file is damaged: {name} is of {found.shape[1]} tokens, not {held}")
        return found

    def _take(self, name: str) -> Tensor:
        if name not in self._left:
            raise ValueError(f"the file is damaged: it lacks {name!r}")
        self._left.remove(name)
        return self._file.get(name)


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[Stored]:
    """Open what `save` wrote.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is something else.
    """
    name = os.fspath(path)
    with open_tensors(path, "is no saved cache") as file:
        text = file.metadata.get("tessera_cache")
        if text is None:
            raise ValueError(f"{name} is no saved cache: it has no 'tessera_cache' header")
        try:
            header = read_json(text)
        except ValueError as error:
            raise ValueError(f"{name}: the header is damaged: {brief(error)}") from None
        if not isinstance(header, dict) or header.get("format") not in range(1, FORMAT + 1):
            found = header.get("format") if isinstance(header, dict) else None
            raise ValueError(f"{name} has format {brief(found)}; this version reads formats 1 to {FORMAT}")
        try:
            yield Stored(file, header)
        except ValueError as error:
            raise ValueError(f"{name}: {brief(error, WHOLE)}") from None


def _may_drop(policy: RetentionPolicy, length: int, sink: int) -> int:
    """Number of tokens behind the sinks that a layer may have dropped after `length` tokens."""
    if policy.limited:
        return max(0, length - sink)
    if policy.window is None:
        return 0
    # The next query sees the window - 1 tokens before it; a memory is still to be given the one before these.
    return max(0, length - policy.window + (0 if policy.tensor_cache else 1) - sink)


def _within(dtype: torch.dtype, wide: torch.dtype) -> bool:
    """Whether `wide` represents all numbers of `dtype`: earlier tokens may have a narrower dtype than the layer's."""
    return dtype in DTYPES.values() and torch.promote_types(dtype, wide) == wide


def _dtype(table: dict[str, Any], key: str) -> torch.dtype:
    found = DTYPES.get(_typed(table, key, str))
    if found is None:
        raise ValueError(f"the header is damaged: {key!r} is {brief(table[key])!r}")
    return found


def _typed(table: dict[str, Any], key: str, kind: type) -> Any:
    value = table.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"the header is damaged: {key!r} is {brief(value)}")
    return value


def _count(table: dict[str, Any], key: str) -> int:
    value: int = _typed(table, key, int)
    if not 0 <= value <= MOST:
        raise ValueError(f"the header is damaged: {key!r} is {brief(value)}")
    return value


def _written(group: SequenceGroup) -> int:
    """Read from the state up to which query pairs have been written."""
    matrix, recent = group.chain.tensor_cache, group.chain.recent
    if matrix is None or matrix.state is None:
        return 0
    found: list[int] = matrix.state.seen.unique().tolist()
    assert matrix.window is not None
    unwritten = group.length - found[0] + matrix.window
    if (
        len(found) != 1
        or not 0 <= found[0] <= group.length
        or recent.tokens < min(unwritten, group.length - group.chain.sink.tokens)
    ):
        raise ValueError(f"the file is damaged: a memory has been written to up to {brief(found)} of {group.length} tokens")
    return found[0]


def _slots(table: dict[str, Any], seen: int) -> Runs:
    runs: list[Any] = _typed(table, "slots", list)
    end = 0
    for run in runs:
        if not isinstance(run, list) or [type(number) for number in run] != [int, int]:
            raise ValueError(f"the header is damaged: a run of slots is {brief(run)}")
        if run[0] < end or run[1] < 1 or sum(run) > seen:
            raise ValueError(f"the header is damaged: slots {brief(run)} behind {end} of {seen}")
        end = sum(run)
    return Runs(tuple((first, size) for first, size in runs))


def _rows(table: dict[str, Any], key: str, batch: int) -> list[int]:
    rows: list[int] = _typed(table, key, list)
    if any(not isinstance(row, int) or isinstance(row, bool) or not 0 <= row < batch for row in rows):
        raise ValueError(f"the header is damaged: {key!r} is {brief(rows)} in a batch of {batch}")
    if rows != sorted(set(rows)):
        raise ValueError(f"the header is damaged: {key!r} is {brief(rows)}")
    return rows
