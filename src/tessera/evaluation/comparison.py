"""Cache specifications side by side on one model and one text.

Two protocols:

- "streaming", as in generation: the text is read in chunks; the tokens of a chunk see each other exactly and everything older
  through the cache, whose sink and recent tiers are exact;
- "paper", as the HQMQ paper measures: every key and value is quantised before attention reads it, also by queries of its own
  window. `recent` and limits are left out of a specification; `sink` stays, so that "sink:4 + hqmq:4" measures the cost of
  quantising everything but the first four tokens. The specifications compared by default have no sinks here.

On a model whose first token is an attention sink, specifications without sinks are measured with four in addition, so that the
table shows the cost of their absence; of the default ones only `TRIED_WITH_SINKS`.

All specifications advance together with the exact model, chunk by chunk, so no more than a chunk of logits is kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from tessera.adapters import attached_memory
from tessera.cache import Cache, CacheReport, Prefill
from tessera.cache.model_config import read_config
from tessera.codecs.channel_stats import KeyStats
from tessera.evaluation.first_token import SINK, first_token_weight, lacks_sinks, with_sinks
from tessera.evaluation.layers import check_layers, measure_layers
from tessera.evaluation.loading import Source, encode, windows
from tessera.evaluation.protocols import PROTOCOLS, filler, new_cache, paper_spec
from tessera.evaluation.records import Comparison, LayerRow, Pair, Row
from tessera.evaluation.standard_errors import standard_error
from tessera.tiers.per_layer import parse

#: Longest window by default, as in the HQMQ paper.
CONTEXT = 2048
#: Of the codecs compared by default, the one that is also measured with sinks where a model has them.
TRIED_WITH_SINKS = "hqmq:4"
#: Codecs that `tessera compare` measures: this project's, the paper's, and widely used ones.
CODECS = (
    "hqmq:3",
    "hqmq:3.5",
    "hqmq:4",
    "hqmq:5",
    "hqmq:s24_r2",
    "hqmq:s96_r4",
    "hqmq:s192_r6_med3",
    "scalar:3",
    "scalar:4",
    "q4_0",
    "int:3",
    "int:4",
    "kivi:4",
    "fp8",
)


@dataclass
class _Tally:
    """The measurements of one specification, token by token.

    Attributes:
        spec: specification of the cache.
        nll: for each group of windows its chunks, each (windows, tokens) float64: negative log-likelihood of the text, in nats.
        kl: likewise, KL(exact || spec) of the predictions, in nats.
        same: tokens at which both models' likeliest next token is the same.
        seconds: for each group.
        filler: number of tokens read after a window so that its last block is complete; only where windows are read in one
            call.
        cache: cache of the group that is being read.
        report: report of the last group's cache.
    """

    spec: str
    nll: list[list[Tensor]] = field(default_factory=list)
    kl: list[list[Tensor]] = field(default_factory=list)
    same: int = 0
    seconds: list[float] = field(default_factory=list)
    filler: int = 0
    cache: Cache | None = None
    report: CacheReport | None = None

    def begin(self, cache: Cache | None) -> None:
        """Begin a new group of windows with a new cache; None: the exact one."""
        self.cache = cache
        self.seconds.append(0.0)
        self.nll.append([])
        self.kl.append([])

    def over_tokens(self) -> tuple[Tensor, Tensor]:
        """`nll` and `kl` of all tokens, each (windows, tokens) in the order of the text."""
        nll, kl = (torch.cat([torch.cat(chunks, dim=1) for chunks in groups]) for groups in (self.nll, self.kl))
        return nll, kl


def default_specs(context: int, protocol: str = "streaming") -> tuple[str, ...]:
    """Return the default specifications, with exact tiers that suit windows of `context` tokens.

    In the paper protocol these are the codecs by themselves.
    """
    if protocol == "paper":
        return ("dense", *CODECS)
    recent, window = min(128, max(1, context // 16)), min(512, max(1, context // 4))
    return ("dense", *(f"sink:4 + {codec} + recent:{recent}" for codec in CODECS), f"sink:4 + window:{window}")


def compare(
    source: Source,
    text: str,
    specs: Sequence[str] | None = None,
    *,
    protocols: Sequence[str] = PROTOCOLS,
    context: int | None = None,
    chunk: int = 64,
    count: int = 4,
    batch: int = 4,
    skip: int = 0,
    layers: bool = False,
    stats: Sequence[KeyStats | None] | None = None,
    text_name: str = "text",
    progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Measure specifications against the exact cache.

    Args:
        source: the model and its tokenizer.
        text: to be predicted.
        specs: cache specifications, "dense" is measured in any case, and those without sinks also with them where the
            model's first token is a sink; None: `default_specs`.
        protocols: one or both of `PROTOCOLS`.
        context: tokens of a window, each of which starts with an empty cache; None: `CONTEXT`, or the model's if shorter.
        chunk: tokens of a call in the streaming protocol.
        count: windows to read, fewer if the text is shorter.
        batch: windows read at once.
        skip: tokens of the text that are left out before the first window.
        layers: also measure every layer by itself on the first window, see `tessera.evaluation.layers`.
        stats: statistics of the model's keys, for the caches that can use them; None: each learns its own.
        text_name: for the record.
        progress: called with (protocol, steps done, steps in all).

    Raises:
        ValueError: for a wrong specification, a text too short, or a context longer than the model's.
    """
    for name in protocols:
        if name not in PROTOCOLS:
            raise ValueError(f"no protocol {name!r}; there are {' and '.join(PROTOCOLS)}")
    for name, value, least in (
        ("context", context, 2),
        ("chunk", chunk, 1),
        ("windows", count, 1),
        ("batch", batch, 1),
        ("skip", skip, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    model = source.model
    if context is None:
        context = min(CONTEXT, source.context or CONTEXT)
    elif source.context is not None and context > source.context:
        raise ValueError(f"a context of {context} tokens is longer than the {source.context} that the model was made for")
    plans = {name: _plan(name, specs or default_specs(context, name)) for name in protocols}
    ids = encode(source.tokenizer, text)
    bos = getattr(source.tokenizer, "bos_token_id", None)
    ids = windows(ids, context, count, bos if len(ids) and ids[0] == bos else None, skip).to(model.device)
    context = ids.shape[1]
    groups = ids.split(batch)
    lacking = [spec for plan in plans.values() for spec in plan if lacks_sinks(spec) and (specs or spec == TRIED_WITH_SINKS)]
    first_token = first_token_weight(model, ids[:1]) if lacking and attached_memory(model) is None else None
    if first_token is not None and first_token > SINK:
        plans = {name: _beside(plan, lacking) for name, plan in plans.items()}

    if layers:
        for plan in plans.values():
            check_layers(model, plan)
    steps = sum(len(plans[p]) * len(groups) * math.ceil(context / (chunk if p == "streaming" else context)) for p in plans)
    done = 0
    rows: list[Row] = []
    pairs: list[Pair] = []
    for protocol, plan in plans.items():
        prefill: Prefill = "exact" if protocol == "streaming" else "quantized"
        size = chunk if protocol == "streaming" else context
        tallies = [_Tally(spec, filler=filler(spec, context) if protocol == "paper" else 0) for spec in plan]
        for group in groups:
            for tally in tallies:
                tally.begin(None if tally.spec == "dense" else new_cache(tally.spec, model, prefill, stats))
            # With a memory attached, the exact model is the one with a cache that does not use the memory.
            plain = attached_memory(model) is None
            exact_cache = DynamicCache(config=model.config) if plain else Cache("dense", model)
            for start in range(0, context, size):
                for _ in _advance(model, group, start, min(context, start + size), exact_cache, tallies):
                    done += 1
                    if progress is not None:
                        progress(protocol, done, steps)
            for tally in tallies:
                if tally.cache is not None:
                    tally.report = tally.cache.report()
                    tally.cache = None
        rows += _rows(protocol, tallies, context, groups, model)
        pairs += _pairs(protocol, tallies)
    found: list[LayerRow] = []
    if layers:
        depth, done = len(read_config(model.config)[1]), 0
        for protocol, plan in plans.items():

            def one_more(protocol: str = protocol) -> None:
                nonlocal done
                done += 1
                if progress is not None:
                    progress(f"{protocol}, layers", done, depth * len(plans))

            found += measure_layers(model, ids[:1], plan, protocol, chunk, one_more, stats)
    dtype = str(model.dtype).removeprefix("torch.")
    return Comparison(
        source.name,
        text_name,
        ids.shape[0] * (context - 1),
        context,
        chunk,
        dtype,
        tuple(rows),
        pairs=tuple(pairs),
        first_token=first_token,
        skip=skip,
        layers=tuple(found),
    )


def _plan(protocol: str, specs: Sequence[str]) -> list[str]:
    """List the specifications that a protocol can measure, "dense" first."""
    wanted = [str(parse(spec)) if protocol == "streaming" else paper_spec(spec) for spec in specs]
    return list(dict.fromkeys(["dense", *(spec for spec in wanted if spec is not None)]))


def _beside(plan: Sequence[str], lacking: Sequence[str]) -> list[str]:
    """Insert after each specification without sinks the same one with sinks, unless it is in the plan already."""
    return list(
        dict.fromkeys(found for spec in plan for found in (spec, *([with_sinks(spec, plan)] if spec in lacking else [])))
    )


def _advance(model: Any, ids: Tensor, start: int, stop: int, exact_cache: Any, tallies: Sequence[_Tally]) -> Any:
    """Feed tokens [start, stop) to the exact model and to every specification; yields after each of them."""
    target = ids[:, start + 1 : stop + 1]
    exact: Tensor | None = None
    for tally in tallies:
        with torch.inference_mode():
            began = time.perf_counter()
            cache = exact_cache if tally.cache is None else tally.cache
            inputs, positions = ids[:, start:stop], {}
            if tally.filler:
                # Tokens of the window again, at positions in the model's context; their predictions are ignored.
                places = torch.arange(stop + tally.filler, device=ids.device)
                inputs, positions = ids[:, places % stop], {"position_ids": places.clamp(max=stop - 1)[None]}
            logits = model(input_ids=inputs, past_key_values=cache, use_cache=True, **positions).logits
            if logits.is_cuda:
                torch.cuda.synchronize()
            tally.seconds[-1] += time.perf_counter() - began
            logp = logits[:, : target.shape[1]].float().log_softmax(-1)
            nll = -logp.gather(-1, target.unsqueeze(-1)).double()
            exact = logp if exact is None else exact
            # In float64, because most terms are tiny compared with the few large ones.
            tally.nll[-1].append(nll.squeeze(-1).cpu())
            tally.kl[-1].append((exact.exp() * (exact - logp)).sum(-1, dtype=torch.float64).cpu())
            tally.same += int((logp.argmax(-1) == exact.argmax(-1)).sum())
        yield


def _rows(protocol: str, tallies: Sequence[_Tally], context: int, groups: Sequence[Tensor], model: Any) -> list[Row]:
    last = len(groups[-1])  # reports are those of the last group's caches
    exact, _ = tallies[0].over_tokens()
    rows = []
    for tally in tallies:
        nll, kl = tally.over_tokens()
        gap, gap_error = float((nll - exact).mean()), standard_error(nll - exact)
        bits = codec_bits = 8.0 * model.dtype.itemsize
        nbytes, compression = _dense_nbytes(model, context), 1.0
        if tally.report is not None:
            bits, compression = tally.report.bits_per_element, tally.report.compression
            nbytes = tally.report.nbytes // last
            codec_bits = _codec_bits(tally.report, {codec for codec, _ in parse(tally.spec).codecs}, bits)
        rows.append(
            Row(
                protocol=protocol,
                spec=tally.spec,
                perplexity=math.exp(float(nll.mean())),
                delta=math.expm1(gap),
                delta_error=math.exp(gap) * gap_error,
                kl=float(kl.mean()),
                top1=tally.same / nll.numel(),
                codec_bits=codec_bits,
                bits=bits,
                nbytes=nbytes,
                compression=compression,
                tokens_per_second=median(len(g) * context / s for g, s in zip(groups, tally.seconds, strict=True)),
                kl_error=standard_error(kl),
                nll_gap=gap,
                nll_gap_error=gap_error,
            )
        )
    return rows


def _pairs(protocol: str, tallies: Sequence[_Tally]) -> list[Pair]:
    """Compare every two specifications that are not exact, in the order given."""
    found = [(tally.spec, *tally.over_tokens()) for tally in tallies if tally.spec != "dense"]
    pairs = []
    for (spec, nll, kl), (other, other_nll, other_kl) in combinations(found, 2):
        gaps = nll - other_nll, kl - other_kl
        (nll_gap, nll_error), (kl_gap, kl_error) = ((float(gap.mean()), standard_error(gap)) for gap in gaps)
        pairs.append(Pair(protocol, spec, other, nll_gap, nll_error, kl_gap, kl_error))
    return pairs


def _codec_bits(report: CacheReport, codecs: set[str], otherwise: float) -> float:
    """True bits an element of all compressed tiers together."""
    # A tier without tokens may still hold statistics.
    names = codecs & report.tier_bits.keys()
    sizes = {name: (8 * report.tiers[name], 8 * report.tiers[name] / report.tier_bits[name]) for name in sorted(names)}
    held = sum(elements for _, elements in sizes.values())
    return sum(bits for bits, _ in sizes.values()) / held if held else otherwise


def _dense_nbytes(model: Any, tokens: int) -> int:
    """Bytes of the keys and values of one sequence as transformers' `DynamicCache` holds them."""
    return sum(
        2 * heads * dim * (tokens if sliding is None else min(tokens, sliding - 1)) * model.dtype.itemsize
        for (heads, dim), sliding in read_config(model.config)[1]
    )
