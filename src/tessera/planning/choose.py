"""`tessera.plan`: the choice of a cache for a model, a context and a budget, with a table of the candidates."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from tessera.cache import BLOCK, Spec
from tessera.cache.model_config import check_shapes, read_config
from tessera.planning.candidates import forgetting, keeping, sizes
from tessera.planning.held import LayerShape, held, steady_after
from tessera.planning.measured import measured
from tessera.planning.sizes import parse_bytes, parse_rate, parse_tokens
from tessera.tiers.per_layer import AnySpec, PerLayer, layer_specs, parse
from tessera.wrapped import unwrap

#: The step, in tokens, in which reached contexts are counted.
STEP = 1024
#: Dtypes that keys and values may have.
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class PlanRow:
    """One candidate of a plan.

    Attributes:
        spec: specification of the cache.
        nbytes: `Cache.report().nbytes` of a real cache after the context, all rows together.
        fits: whether that is within the budget.
        kl: measured KL divergence from the exact model, in nats a token, of the codec on the model of the table, of several
            codecs the largest; 0 for an exact cache. None: for a codec that was not measured or is read sparsely, or where
            tokens are dropped, whose loss the codec's error does not include.
        kept: tokens of the context that a full layer holds at its end.
        reach: most tokens, in whole 1,024, that the budget holds; None: any number.
        read: bytes of keys and values that attention reads for the next token of every row.
        seconds: time to read them at the bandwidth; None: no bandwidth was given.
    """

    spec: str
    nbytes: int
    fits: bool
    kl: float | None
    kept: int
    reach: int | None
    read: int
    seconds: float | None


@dataclass(frozen=True)
class Plan:
    """The result of `plan`.

    Attributes:
        spec: specification of the cache to use; None: no candidate fits.
        rows: all candidates, those that fit first, the best first.
        context: tokens of a row.
        budget: bytes for the cache.
        batch: rows.
        dtype: dtype of keys and values, as "bfloat16".
        bandwidth: bytes a second, or None.
        made_for: tokens that the model was made for, if its config says so.
    """

    spec: str | None
    rows: tuple[PlanRow, ...]
    context: int
    budget: int
    batch: int
    dtype: str
    bandwidth: int | None = None
    made_for: int | None = None


def plan(
    model_or_config: Any,
    *,
    context: int | str,
    budget: int | str,
    batch: int = 1,
    dtype: str | torch.dtype | None = None,
    bandwidth: int | str | None = None,
    specs: Sequence[str | AnySpec] | None = None,
) -> Plan:
    """Find the cache that loses least within a budget. No weights are read, and no tensor of the cache is made.

    Candidates that fit rank by the tokens that they keep, then by the measured error of their codec, then by their bytes.

    Args:
        model_or_config: a transformers model or config; or, as text, a folder with a config.json, a GGUF file, or a name on
            the hub.
        context: tokens of a row, padding excluded: 131072, "128k".
        budget: bytes for the cache, the weights and the working memory of the model excluded: "8GiB".
        batch: rows.
        dtype: dtype of keys and values; None: of the model or, as far as the config says, of its weights, else bfloat16.
        bandwidth: bandwidth of the memory in bytes a second, "50GB/s", to estimate reading time. None: no estimate.
        specs: candidates; None: see `tessera.planning.candidates`.

    Raises:
        ValueError: for a number that cannot be read, or a spec or model that a cache cannot serve, saying why.
        FileNotFoundError: if there is no such folder or file.
    """
    tokens, most = parse_tokens(context), parse_bytes(budget)
    rate = None if bandwidth is None else parse_rate(bandwidth)
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch!r}")
    config, given = _config(model_or_config)
    text, layers = read_config(config)
    if isinstance(given, nn.Module):
        check_shapes(given, layers)
    kind = _dtype(dtype, given, text, config)
    needed = _needed(layers, tokens)

    def row(spec: str | AnySpec) -> PlanRow:
        return _row(parse(spec), layers, kind, batch, tokens, needed, most, rate)

    def fits(spec: str) -> bool:
        return held(parse(spec), layers, kind, batch, [tokens])[tokens].nbytes <= most

    if specs is None:
        rows = [row(spec) for spec in keeping()] + _fitting(row, fits, needed)
    else:
        rows = [row(spec) for spec in dict.fromkeys(map(parse, specs))]
        if not rows:
            raise ValueError("specs must name at least one cache")
    rows.sort(key=_rank)
    return Plan(
        spec=rows[0].spec if rows[0].fits else None,
        rows=tuple(rows),
        context=tokens,
        budget=most,
        batch=batch,
        dtype=str(kind).removeprefix("torch."),
        bandwidth=rate,
        made_for=getattr(text, "max_position_embeddings", None),
    )


def _config(model_or_config: Any) -> tuple[Any, Any]:
    """Return the config, and the argument without wrappers."""
    if isinstance(model_or_config, str):
        from tessera.evaluation.loading import load_config

        return load_config(model_or_config), None
    given = unwrap(model_or_config)
    return (given.config if isinstance(given, nn.Module) and hasattr(given, "config") else given), given


def _dtype(wanted: str | torch.dtype | None, given: Any, *configs: Any) -> torch.dtype:
    found: Any = wanted
    if found is None and isinstance(given, nn.Module):
        found = given.dtype
    for config in configs:
        found = getattr(config, "dtype", None) if found is None else found
    name = "bfloat16" if found is None else str(found).removeprefix("torch.")
    if name not in DTYPES:
        if wanted is not None:
            raise ValueError(f"no dtype {name!r}; there are {', '.join(DTYPES)}")
        name = "bfloat16"  # the compute dtype of weights in eight bits or fewer
    kind: torch.dtype = getattr(torch, name)
    return kind


def _needed(layers: Sequence[LayerShape], tokens: int) -> int:
    """Return how many tokens back the model's own attention sees."""
    if any(sliding is None for _, sliding in layers):
        return tokens
    return min(tokens, max(sliding for _, sliding in layers if sliding is not None))


def _row(
    spec: AnySpec,
    layers: Sequence[LayerShape],
    dtype: torch.dtype,
    batch: int,
    context: int,
    needed: int,
    budget: int,
    rate: int | None,
) -> PlanRow:
    if spec.tensor_cache:
        raise ValueError(
            f"a memory behind a window ('tc' in {str(spec)!r}) is attached to a model; a plan counts caches without"
        )
    found = held(spec, layers, dtype, batch, [context])[context]
    kept = min(
        _kept(own, context, needed, any(sliding is None for _, sliding in layers)) for own in layer_specs(spec, len(layers))
    )
    return PlanRow(
        spec=str(spec),
        nbytes=found.nbytes,
        fits=found.nbytes <= budget,
        kl=_kl(spec) if kept == context else None,
        kept=kept,
        reach=_reach(spec, layers, dtype, batch, budget),
        read=found.read,
        seconds=None if rate is None else found.read / rate,
    )


def _kept(spec: Spec, context: int, needed: int, full: bool) -> int:
    """Return how many tokens of the context are kept; all of them where only tokens that no layer sees are dropped."""
    if not spec.bounded:
        return context
    most = spec.window if spec.window is not None else sum(limit or 0 for _, limit in spec.codecs) + spec.recent
    most += spec.sink if full else 0  # unused by a layer with a window of its own
    return context if most >= needed else most


def _kl(spec: AnySpec) -> float | None:
    """Return the largest error of a cache's codecs; None if one was not measured, or is read sparsely."""
    if any(own.tops or own.others for own in (spec.specs if isinstance(spec, PerLayer) else [spec])):
        return None
    found = [measured().get(codec) for codec, _ in spec.codecs]
    return max((row.kl for row in found if row is not None), default=0.0) if None not in found else None


def _rank(row: PlanRow) -> tuple[bool, int, float, int]:
    kl = _kl(parse(row.spec))
    return not row.fits, -row.kept, math.inf if kl is None else kl, row.nbytes


def _fitting(row: Callable[[str], PlanRow], fits: Callable[[str], bool], needed: int) -> list[PlanRow]:
    """Find the largest bounded cache of each kind that fits, or the smallest if none does."""
    found = []
    for specs in zip(*map(forgetting, sizes(needed)), strict=True):
        # The bytes grow with the size, so the largest that fits is found by halving.
        first = bisect_left(specs, True, key=fits)
        found.append(row(specs[min(first, len(specs) - 1)]))
    return found


def _reach(spec: AnySpec, layers: Sequence[LayerShape], dtype: torch.dtype, batch: int, budget: int) -> int | None:
    """Find the largest number of tokens, in whole `STEP`, whose cache fits; None: any number fits."""
    start = steady_after(spec, layers)
    whole, within = range(STEP, start + STEP + 1, STEP), range(start, start + STEP, BLOCK)
    counted = held(spec, layers, dtype, batch, {*whole, *within})
    early = list(takewhile(lambda n: counted[n].nbytes <= budget, whole))
    if len(early) < len(whole):
        return early[-1] if early else 0
    more = counted[start + STEP].nbytes - counted[start].nbytes
    if more:
        return start + (budget - counted[start].nbytes) // more * STEP
    # It stops growing, except for the room of a block in each layer that varies within a page.
    return None if all(counted[n].nbytes <= budget for n in within) else start
