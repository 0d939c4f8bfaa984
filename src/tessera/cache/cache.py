"""`tessera.Cache`: a transformers `Cache` whose layers are tiers."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache as TransformersCache

from tessera import codecs
from tessera.attention import enable, unsupported
from tessera.cache import cache_file
from tessera.cache.model_config import check_shapes, read_config, rotary_partner
from tessera.cache.ranks import Ranks, heads_here, ranks_of
from tessera.cache.report import CacheReport
from tessera.cache.stream_file import named
from tessera.cache_layers.cache_layer import ATTACHED, CacheContext, TesseraLayer
from tessera.cache_layers.deferred import UNCOMPILED
from tessera.cache_layers.stream import Stream
from tessera.codecs.channel_stats import KeyStats, load_stats
from tessera.devices import layer_devices
from tessera.files import brief
from tessera.finite import FiniteCheck
from tessera.tiers.chain import tier_name
from tessera.tiers.offload import mapped, store
from tessera.tiers.per_layer import AnySpec, layer_specs, parse
from tessera.tiers.policy import RetentionPolicy
from tessera.tiers.spec import Spec
from tessera.wrapped import replaces_cache, unwrap

#: "packed" is what "quantized" was called in version 0.1.
Prefill = Literal["exact", "quantized", "packed"]


class Cache(TransformersCache):
    """A cache of keys and values in tiers, for `model.generate(..., past_key_values=tessera.Cache(spec, model))`.

    Args:
        spec: tiers joined by `+`, such as "sink:4 + hqmq:4 + recent:128"; see `tessera.tiers.spec.parse`. Or one for each
            layer, as "{0-1,-1: sink:4 + hqmq:5 + recent:128; *: sink:4 + hqmq:3 + recent:128}".
        model_or_config: the transformers model that the cache serves, by itself or wrapped (`DataParallel`,
            `DistributedDataParallel`, peft, `torch.compile`); its attention is routed through Tessera (see `tessera.enable`;
            `tessera.disable` undoes it, and so does the end of a block ``with tessera.using(model):`` around all this). Or the
            model's own config object: then nothing is switched, and as long as the model uses another attention, keys and
            values are decoded for every call, with one warning.
        prefill: "exact": queries of a call read the call's own tokens in full precision; these are quantised after it.
            "quantized": what leaves `recent` is quantised first and read in that form, also by the call's own queries. The
            tokens kept afterwards are the same. The second is for measurements: where a codec encodes tokens in groups, a query
            reads tokens of its group whose common mean was taken over later tokens too, so that a later token can change an
            earlier result, by less than the codec's error. Until the call ends, the tokens that it quantises stay in the first
            of several codecs, even past its limit.
        stats: statistics of the model's keys, a file of `tessera stats` or a result of `load_stats`; None: each sequence
            measures its own.
        offload: where whole pages of 1,024 quantised tokens go: "cpu", for a model on another device, or a folder, in whose
            files they are mapped into memory. They are attended to there, and only partial results travel. None: nowhere.

    Keys and values stay in the dtypes that the model gives them in, each in its own. Where a later call gives a wider one, as
    after a call under autocast, a tier is widened to it; nothing is rounded. Packing is the same under autocast as without.

    Raises:
        ValueError: for a spec with a mistake, or a model that this cache cannot serve, saying why.
    """

    layers: list[TesseraLayer]

    def __init__(
        self,
        spec: str | AnySpec,
        model_or_config: Any,
        *,
        prefill: Prefill = "exact",
        stats: str | os.PathLike[str] | Sequence[KeyStats | None] | None = None,
        offload: str | os.PathLike[str] | None = None,
    ) -> None:
        self.spec = parse(spec)
        if prefill not in ("exact", "quantized", "packed"):
            raise ValueError(f"prefill must be 'exact' or 'quantized', got {prefill!r}")
        self.prefill = "quantized" if prefill == "packed" else prefill
        refused = replaces_cache(model_or_config)
        if refused:
            raise ValueError(f"tessera.Cache: {refused}")
        model_or_config = unwrap(model_or_config)
        config = getattr(model_or_config, "config", None) if isinstance(model_or_config, nn.Module) else model_or_config
        if config is None:
            raise TypeError(f"expected a transformers model or its config, got {type(model_or_config).__name__}")
        text, layers = read_config(config)
        ranks: Ranks | None = None
        self._specs = layer_specs(self.spec, len(layers))
        self._store = store(offload)
        self.memory = self._check_memory(model_or_config) if self.spec.tensor_cache else ""
        if isinstance(model_or_config, nn.Module):
            why = unsupported(model_or_config)
            if why:
                raise ValueError(
                    f"{type(model_or_config).__name__}: {why}. tessera.Cache(spec, model.config) works where keys and values "
                    "may be decoded for every call"
                )
            check_shapes(model_or_config, layers)
            ranks = ranks_of(model_or_config)
            if ranks is not None:
                layers = heads_here(model_or_config, layers, ranks)
            enable(model_or_config)
        used = {spec: tuple(codecs.get(name) for name, _ in spec.codecs) for spec in self._specs}
        safe = all(spec.codec is None or spec.sink > 0 for spec in self._specs)
        finite = FiniteCheck()
        context = CacheContext(text, self.prefill == "quantized", self.spec.bounded, len(layers) - 1, safe)
        given = getattr(model_or_config, ATTACHED).layers if self.spec.tensor_cache else ()
        known = _known_stats(stats, [codec for found in used.values() for codec in found], layers, ranks)
        self.ranks = ranks
        super().__init__(
            layers=[
                TesseraLayer(
                    i,
                    RetentionPolicy.of(
                        spec, used[spec], sliding, i in given, known[i], rotary_partner(text, shape[1]), self._store, finite
                    ),
                    shape,
                    sliding,
                    context,
                )
                for i, (spec, (shape, sliding)) in enumerate(zip(self._specs, layers, strict=True))
            ]
        )

    def _check_memory(self, model: Any) -> str:
        """Return the attached memory's configuration for a spec with "tc", as JSON; refuse one that does not fit."""
        done = getattr(model, ATTACHED, None)
        if done is None or done.kind != "TensorCache":
            raise ValueError(
                f"'tc' in {str(self.spec)!r} needs a Tensor Cache attached to the model, and the model itself instead of its "
                "config: tessera.attach(model, TensorCacheConfig(...)) or tessera.load_memory(model, path)"
            )
        wanted = (done.config.sink, done.config.window)
        for spec in self._specs:
            # Behind codecs it is written what they let go, however long they kept it.
            if (spec.sink, wanted[1] if spec.codec is not None else spec.window) != wanted:
                raise ValueError(
                    f"the memory of this model was made for 'sink:{wanted[0]} + window:{wanted[1]} + tc', not {str(spec)!r}"
                )
        return json.dumps(done.config.to_dict(), sort_keys=True)

    def __repr__(self) -> str:
        return f"Cache({str(self.spec)!r}, {len(self.layers)} layers, {self.get_seq_length()} tokens)"

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Keys, values and, of a sliding layer, its window for each layer, as `DynamicCache`; see `TesseraLayer.dense`."""
        for layer in self.layers:
            keys, values = layer.dense() or (None, None)
            yield keys, values, None if layer.sliding is None else torch.tensor(layer.sliding)

    def __copy__(self) -> Cache:
        # A copy that shared its layers would receive the tokens given to the other.
        return copy.deepcopy(self)

    @property
    def max_cache_len(self) -> int:
        """Refuse peft's prefix tuning, the only caller of this property, because it would leave this cache unused.

        Raises:
            RuntimeError: always, saying so.
        """
        raise RuntimeError(
            "tessera.Cache has no max_cache_len. peft's prefix tuning asks for it and would begin every text with a "
            "DynamicCache of its own in place of this cache; use prompt tuning or LoRA, or no tessera.Cache"
        )

    @torch.compiler.disable(reason=UNCOMPILED)
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Stage the new tokens of a layer; see `TesseraLayer.update`.

        Raises:
            ValueError: if the model is not the one that the cache was made for.
            RuntimeError: in gradient mode, or after a call that stopped half-way.
        """
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"this cache was made for a model of {len(self.layers)} layers and was given keys of layer {layer_idx}; make a "
                "cache for each model"
            )
        if layer_idx == 0 and len({layer.seen for layer in self.layers}) > 1:
            raise RuntimeError(
                f"the layers of this cache have seen {sorted({layer.seen for layer in self.layers})} tokens: a call stopped "
                "half-way, or the model has fewer layers than the one it was made for; call cache.reset()"
            )
        if layer_idx == 0:
            self.layers[0].context.masks.forget()
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow a beam search. beam_idx: (batch,) int64."""
        rows = beam_idx.tolist()
        for layer in self.layers:
            layer.select(rows)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens; see `TesseraLayer.crop`. If one layer refuses, no layer is changed."""
        for layer in self.layers:
            layer.check_crop(tokens_to_remove)
        for layer in self.layers:
            layer.crop(tokens_to_remove)

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Older name of `get_max_length`."""
        return self.layers[layer_idx].get_max_length()

    def to(self, device: torch.device | str | int | None, non_blocking: bool = False) -> Cache:
        """Move all tiers to a device; None: leave them. They come back when a model on another device goes on with them.

        `non_blocking` is ignored; accelerate passes it to every `to`.
        """
        if device is None:
            return self
        for layer in self.layers:
            layer.to(device)
        return self

    def report(self, *, all_ranks: bool = False) -> CacheReport:
        """Count the bytes that the cache holds.

        Args:
            all_ranks: for a tensor-parallel model, add up the bytes of all processes; every process has to call this then.
        """
        sizes: dict[str, int] = {}
        tokens: dict[str, int] = {}
        dense = 0
        for layer, spec in zip(self.layers, self._specs, strict=True):
            heads, dim = layer.shape
            names = _tier_names(spec)
            for tier, tensors in layer.buffers().items():
                name = names.get(tier, tier)
                sizes[name] = sizes.get(name, 0) + sum(t.numel() * t.element_size() for t in tensors)
            for tier, count in layer.held().items():
                name = names.get(tier, tier)
                tokens[name] = tokens.get(name, 0) + 2 * count * heads * dim
            if layer.dtype is not None and layer.value_dtype is not None:
                kept = layer.seen if layer.sliding is None else min(layer.seen, layer.sliding - 1)
                # It keeps values in the dtype of the keys, unless theirs is wider.
                wider = torch.promote_types(layer.dtype, layer.value_dtype)
                dense += layer.batch * kept * heads * dim * (layer.dtype.itemsize + wider.itemsize)
        nbytes, elements = sum(sizes.values()), sum(tokens.values())
        found = CacheReport(
            spec=str(self.spec),
            nbytes=nbytes,
            tiers={name: size for name, size in sizes.items() if size},
            tier_bits={name: 8 * sizes[name] / n for name, n in tokens.items() if n},
            elements=elements,
            bits_per_element=8 * nbytes / max(1, elements),
            tokens=self.get_seq_length(),
            dense_nbytes=dense,
            compression=dense / max(1, nbytes),
            offloaded=sum(map(self._offloaded, self.layers)),
            set_aside=sum(group.chain.set_aside for layer in self.layers for group in layer.groups),
            ranks=1 if self.ranks is None else self.ranks.size,
        )
        return found if self.ranks is None or not all_ranks else self.ranks.sum(found)

    def _offloaded(self, layer: TesseraLayer) -> int:
        """Count the bytes of a layer that are in files, or on the CPU while the model computes elsewhere."""
        if self._store is None:
            return 0
        held = (tensor for tensors in layer.buffers().values() for tensor in tensors)
        return sum(t.nbytes for t in held if mapped(t) or t.device != layer.held_on)

    def save(self, path: str | os.PathLike[str], *, notes: Mapping[str, str] | None = None) -> None:
        """Write everything to a safetensors file; `path` is replaced only when the whole file is there.

        Of a tensor-parallel model every process has a file of its own.

        Args:
            path: path of the file.
            notes: text for the file's header, by names of the caller's own; `load` does not look at it.

        Raises:
            ValueError: if it has been given keys or values that are not finite, which on a GPU is found out here or at the next
                call; nothing is written.
        """
        self.layers[0].policy.finite.read()
        cache_file.save(self.layers, self._describe(), path, notes)

    def _describe(self) -> dict[str, str]:
        about = {"spec": str(self.spec), "prefill": self.prefill, "memory": self.memory}
        if self.ranks is not None:
            about["ranks"] = str(self.ranks)
        read_along = cache_file.read_along(self.layers)
        return about if read_along is None else {**about, "tensor_memory": named(read_along)}

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model_or_config: Any, *, offload: str | os.PathLike[str] | None = None
    ) -> Cache:
        """Read what `save` wrote, each layer onto the device that its layer of the model computes on.

        That is the CPU if only a config is given. What is loaded follows the keys that the model gives later. `offload`: see
        `Cache`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged, or was made for another model.
        """
        with cache_file.reading(path) as stored:
            prefill: Any = stored.text("prefill")
            cache = cls(stored.text("spec"), model_or_config, prefill=prefill, offload=offload)
            if stored.text("memory") != cache.memory:
                raise ValueError(
                    f"this cache was saved with the memory {stored.text('memory') or 'none'}; yours is {cache.memory or 'none'}"
                )
            saved, here = stored.text("ranks", ""), "" if cache.ranks is None else str(cache.ranks)
            if saved != here:
                raise ValueError(
                    f"this file holds the heads of {_process(saved)}, and they are wanted for {_process(here)}; save the "
                    "cache of every process in a file of its own, and load it there"
                )
            stored.fill(cache.layers, _streams(stored.tensor_memory, model_or_config))
        model = unwrap(model_or_config)
        if isinstance(model, nn.Module):
            for layer, device in zip(cache.layers, layer_devices(model, len(cache.layers)), strict=True):
                if device is not None:
                    layer.to(device)
        return cache


def _streams(config: str, model: Any) -> dict[int, tuple[Stream, int, bool]]:
    """Make an empty stream for each layer of a model with a Tensor Memory.

    Args:
        config: configuration of the memory that had read along with a cache, as JSON; empty: none had.
        model: that the cache is to serve.

    Raises:
        ValueError: if the model has no such memory.
    """
    if not config:
        return {}
    done: Any = getattr(unwrap(model), ATTACHED, None)
    own = "" if done is None or done.kind != "TensorMemory" else named(done.config)
    if own != config:
        raise ValueError(
            f"a Tensor Memory {brief(config)} had read along with this cache, and yours is {own or 'none'}; attach it to the "
            "model first (tessera.load_memory), and give the model instead of its config"
        )
    first = min(done.layers)
    return {index: (Stream(0, done.owner, done.config), done.shared.dim, index == first) for index in done.layers}


def _process(ranks: str) -> str:
    return f"process {ranks}" if ranks else "a model in one process"


def _tier_names(spec: Spec) -> dict[str, str]:
    """Map a layer's own names of its tiers to the names in a report, where these differ."""
    exact = "dense" if spec.dense else "window" if spec.window is not None else "recent"
    return {**{tier_name(number): codec for number, (codec, _) in enumerate(spec.codecs)}, "recent": exact}


def _known_stats(
    stats: str | os.PathLike[str] | Sequence[KeyStats | None] | None,
    used: Sequence[codecs.Codec],
    layers: Sequence[tuple[tuple[int, int], int | None]],
    ranks: Ranks | None,
) -> list[KeyStats | None]:
    """Match the statistics that the caller gave to the layers of the model.

    Raises:
        ValueError: if the codec has no use for them, or they are of another model.
    """
    if stats is None:
        return [None] * len(layers)
    if not any(codec.weighs for codec in used):
        used = list(dict.fromkeys(used))
        what = " and ".join(repr(codec.spec) for codec in used)
        what = f"{what} {'has' if len(used) == 1 else 'have'} no use for them" if used else "this spec has no codec"
        raise ValueError(f"stats are for codecs that see keys as queries do, such as 'hqmq:4'; {what}")
    known = list(load_stats(stats)) if isinstance(stats, str | os.PathLike) else list(stats)
    if len(known) != len(layers):
        raise ValueError(f"these statistics are of a model of {len(known)} layers; yours has {len(layers)}")
    for index, (found, (shape, _)) in enumerate(zip(known, layers, strict=True)):
        if found is not None:
            if ranks is not None and found.sizes.ndim == 3 and found.sizes.shape[1] == ranks.size * shape[0]:
                known[index] = found = KeyStats(found.sizes.chunk(ranks.size, dim=1)[ranks.index])
            try:
                found.check(*shape)
            except ValueError as error:
                raise ValueError(f"layer {index}: {error}") from None
            if len(found.sizes) != 1:
                raise ValueError(f"layer {index}: statistics of {len(found.sizes)} rows; those that are given are of one")
    return known
