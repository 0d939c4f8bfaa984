"""Cache specifications side by side on one model and one text.

Two protocols:

- "streaming", what generation does: the text goes in by chunks; the tokens of a chunk see each other exactly and everything
  older through the cache, whose sink and recent tiers are exact;
- "paper", as the HQMQ paper measures: no exact tiers, and every key and value is quantised before it is attended to,
  also by its own window's queries.

All specifications advance together with the exact model, chunk by chunk, so that no more than a chunk of logits is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from tessera.cache import Cache
from tessera.cache.spec import parse
from tessera.evaluation.records import Comparison, Row

PROTOCOLS = ("streaming", "paper")

#: What `tessera compare` shows when not told otherwise: the exact cache, this project's codecs, the paper's, and what is in use.
DEFAULT_SPECS = (
    "dense",
    *(
        f"sink:4 + {codec} + recent:128"
        for codec in (
            "hqmq:3",
            "hqmq:3.5",
            "hqmq:4",
            "hqmq:4.5",
            "hqmq:s24_r2",
            "hqmq:s96_r4",
            "hqmq:s192_r6_med3",
            "scalar:3",
            "scalar:4",
            "q4_0",
            "int:4",
            "kivi:4",
            "fp8",
        )
    ),
    "sink:4 + window:512",
)


@dataclass
class _Tally:
    """Sums over tokens, for one specification."""

    spec: str
    nll: float = 0.0
    kl: float = 0.0
    same: int = 0
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    cache: Any = None
    report: Any = None


def paper_spec(spec: str) -> str | None:
    """The specification without its exact tiers, or None where nothing is left to measure."""
    parsed = parse(spec)
    if parsed.dense:
        return "dense"
    return parsed.codec


def compare(
    model: Any,
    ids: Tensor,
    specs: Sequence[str] = DEFAULT_SPECS,
    *,
    protocols: Sequence[str] = PROTOCOLS,
    context: int = 2048,
    chunk: int = 64,
    windows: int = 4,
    batch: int = 4,
    names: tuple[str, str] = ("model", "text"),
    progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Measure specifications against the exact cache.

    Args:
        model: a transformers causal language model.
        ids: (tokens,) int64, the text.
        specs: cache specifications; "dense" first or not at all, it is measured in any case.
        protocols: of `PROTOCOLS`.
        context: tokens of a window; every window starts with an empty cache.
        chunk: tokens of a call in the streaming protocol.
        windows: how many windows to read, fewer if the text is shorter.
        batch: windows read at once.
        names: of the model and of the text, for the record.
        progress: called with (what is being done, steps done, steps in all).

    Raises:
        ValueError: if the text has fewer than two tokens, or the context is longer than the model's.
    """
    for name in protocols:
        if name not in PROTOCOLS:
            raise ValueError(f"no protocol {name!r}; there are {' and '.join(PROTOCOLS)}")
    if ids.ndim != 1 or len(ids) < 2:
        raise ValueError(f"the text must have at least two tokens, it has {ids.numel()}")
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and context > longest:
        raise ValueError(f"context {context} is longer than the model's {longest} tokens")
    if context < 2 or chunk < 1 or windows < 1 or batch < 1:
        raise ValueError(f"context must be 2 or more and the rest positive: {context=}, {chunk=}, {windows=}, {batch=}")
    context = min(context, len(ids))
    text = ids[: len(ids) // context * context].view(-1, context)[:windows].to(model.device)
    groups = text.split(batch)

    plans = {name: _plan(name, specs) for name in protocols}
    steps = sum(len(groups) * -(-context // (chunk if p == "streaming" else context)) for p in plans)
    done = 0
    rows: list[Row] = []
    for protocol, plan in plans.items():
        tallies = [_Tally(spec) for spec in plan]
        for group in groups:
            for tally in tallies:
                prefill = "exact" if protocol == "streaming" else "packed"
                tally.cache = None if tally.spec == "dense" else Cache(tally.spec, model, prefill=prefill)  # type: ignore[arg-type]
                tally.seconds.append(0.0)
            size = chunk if protocol == "streaming" else context
            exact_cache = DynamicCache(config=model.config)
            for start in range(0, context, size):
                if progress is not None:
                    progress(protocol, done, steps)
                _advance(model, group, start, min(context, start + size), exact_cache, tallies)
                done += 1
            for tally in tallies:
                if tally.cache is not None:
                    tally.report = tally.cache.report()
        rows += _rows(protocol, tallies, text.shape, groups, model)
    if progress is not None:
        progress("done", steps, steps)
    return Comparison(names[0], names[1], text.shape[0] * (context - 1), context, chunk, tuple(rows))


def _plan(protocol: str, specs: Sequence[str]) -> list[str]:
    """The specifications a protocol can measure, "dense" first."""
    wanted = [str(parse(spec)) if protocol == "streaming" else paper_spec(spec) for spec in specs]
    return list(dict.fromkeys(["dense", *(spec for spec in wanted if spec is not None)]))


@torch.inference_mode()
def _advance(
    model: Any, text: Tensor, start: int, stop: int, exact_cache: DynamicCache, tallies: Sequence[_Tally]
) -> None:
    """Feed tokens [start, stop) to the exact model and to every specification, and add up how they differ."""
    target = text[:, start + 1 : stop + 1]
    exact: Tensor | None = None
    for tally in tallies:
        cache = exact_cache if tally.cache is None else tally.cache
        began = time.perf_counter()
        logits = model(input_ids=text[:, start:stop], past_key_values=cache, use_cache=True).logits
        tally.seconds[-1] += time.perf_counter() - began
        logp = logits[:, : target.shape[1]].float().log_softmax(-1)
        if exact is None:
            exact = logp
        nll = -logp.gather(-1, target.unsqueeze(-1))
        # KL summed in float64: most terms are tiny beside the few large ones.
        kl = (exact.exp() * (exact - logp)).sum(-1, dtype=torch.float64)
        tally.nll += float(nll.sum(dtype=torch.float64))
        tally.kl += float(kl.sum())
        tally.same += int((logp.argmax(-1) == exact.argmax(-1)).sum())
        tally.tokens += target.numel()


def _rows(
    protocol: str, tallies: Sequence[_Tally], shape: torch.Size, groups: Sequence[Tensor], model: Any
) -> list[Row]:
    exact = tallies[0]
    base = exact.nll / exact.tokens
    some = next((t.report for t in tallies if t.report is not None), None)
    last = len(groups[-1])
    rows = []
    for tally in tallies:
        nll = tally.nll / tally.tokens
        speed = median(len(g) * shape[1] / s for g, s in zip(groups, tally.seconds, strict=True))
        if tally.report is None:
            dense = some.dense_nbytes if some is not None else Cache("dense", model).report().dense_nbytes
            bits = codec_bits = 8.0 * model.dtype.itemsize
            nbytes, compression = dense // last, 1.0
        else:
            report = tally.report
            bits, nbytes, compression = report.bits_per_element, report.nbytes // last, report.compression
            codec_bits = report.tier_bits.get(parse(tally.spec).codec or "", bits)
        rows.append(
            Row(
                protocol=protocol,
                spec=tally.spec,
                perplexity=float(torch.tensor(nll, dtype=torch.float64).exp()),
                delta=float(torch.tensor(nll - base, dtype=torch.float64).expm1()),
                kl=tally.kl / tally.tokens,
                top1=tally.same / tally.tokens,
                codec_bits=codec_bits,
                bits=bits,
                nbytes=nbytes,
                compression=compression,
                tokens_per_second=speed,
            )
        )
    return rows
