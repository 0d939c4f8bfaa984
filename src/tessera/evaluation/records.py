"""The result record of evaluations, and its JSON format."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from tessera.files import write_json
from tessera.kernels import cpu
from tessera.version import VERSION


@dataclass(frozen=True)
class Row:
    """The results of one cache specification under one protocol.

    Attributes:
        protocol: "streaming" or "paper", see `tessera.evaluation.comparison`.
        spec: specification of the cache.
        perplexity: exp of the mean negative log-likelihood of the text.
        delta: perplexity relative to the exact cache, minus one.
        delta_error: standard error of `delta` over the tokens of this text, paired with the exact cache; see
            `tessera.evaluation.standard_errors`. Records before `kl_error` was kept took tokens for independent.
        kl: mean over tokens of KL(exact || spec), in nats.
        top1: share of tokens at which both models' likeliest next token is the same.
        codec_bits: true bits per element of the compressed tier; of the whole cache where there is none.
        bits: true bits per element of everything the cache keeps, exact tiers included.
        nbytes: bytes of the cache of one sequence at the end of a window; in the paper protocol the window is followed by
            as many tokens as make its last block whole.
        compression: bytes of a dense cache over `nbytes`.
        tokens_per_second: text tokens evaluated per second, all sequences together, median over groups of windows.
        kl_error: standard error of `kl` over tokens, in nats; None in older records, as the next two.
        nll_gap: mean over tokens of the negative log-likelihood less that with the exact cache, in nats.
        nll_gap_error: standard error of `nll_gap`.
    """

    protocol: str
    spec: str
    perplexity: float
    delta: float
    delta_error: float
    kl: float
    top1: float
    codec_bits: float
    bits: float
    nbytes: int
    compression: float
    tokens_per_second: float
    kl_error: float | None = None
    nll_gap: float | None = None
    nll_gap_error: float | None = None


@dataclass(frozen=True)
class Pair:
    """Two cache specifications under one protocol, compared token by token; differences are `spec` less `other`, in nats.

    Attributes:
        protocol: "streaming" or "paper".
        spec: specification of the first cache.
        other: specification of the second cache.
        nll: mean difference of the negative log-likelihoods of the text.
        nll_error: standard error of `nll`, see `tessera.evaluation.standard_errors`.
        kl: mean difference of the divergences from the exact model.
        kl_error: standard error of `kl`.
    """

    protocol: str
    spec: str
    other: str
    nll: float
    nll_error: float
    kl: float
    kl_error: float


@dataclass(frozen=True)
class LayerRow:
    """The effect of one cache on the attention of one layer, see `tessera.evaluation.layers`.

    Attributes:
        protocol: "streaming" or "paper".
        spec: specification of the cache.
        layer: index of the layer, from 0.
        kl: mean over heads and queries of KL(exact weights || weights over decoded keys), in nats; None where keys are dropped.
        error: relative error of attention's output: root of the sum of squares of the difference over that of the exact output.
    """

    protocol: str
    spec: str
    layer: int
    kl: float | None
    error: float


@dataclass(frozen=True)
class Comparison:
    """The results of `compare`, and the model and text they were measured on.

    Attributes:
        model: path or name of the model.
        text: what was read.
        tokens: tokens that were predicted, per protocol.
        context: tokens of a window.
        chunk: tokens of a call in the streaming protocol.
        dtype: dtype of the model, and so of the exact cache.
        rows: the results.
        environment: versions and processor.
        pairs: every two specifications that are not exact; none in older records.
        first_token: greatest mean weight, over layers, that later queries give to the first token; None where it was not
            measured, because no specification is without sinks.
        skip: tokens of the text that were left out before the first window.
        layers: the effect of each cache on each layer; empty unless it was requested.
    """

    model: str
    text: str
    tokens: int
    context: int
    chunk: int
    dtype: str
    rows: tuple[Row, ...]
    environment: dict[str, str] = field(default_factory=lambda: environment())
    pairs: tuple[Pair, ...] = ()
    first_token: float | None = None
    skip: int = 0
    layers: tuple[LayerRow, ...] = ()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON."""
        save_all([self], path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Comparison:
        """Read what `save` wrote.

        Raises:
            ValueError: if the file holds something else, or comparisons of several models, which `load_all` reads.
        """
        found = load_all(path)
        if len(found) != 1:
            raise ValueError(f"{path} holds comparisons of {len(found)} models; read them with load_all")
        return found[0]


def save_all(comparisons: Sequence[Comparison], path: str | os.PathLike[str]) -> None:
    """Write the comparisons of several models, or of one, as one file of JSON."""
    made = [asdict(comparison) for comparison in comparisons]
    write_json(path, made[0] if len(made) == 1 else {"comparisons": made})


def load_all(path: str | os.PathLike[str]) -> list[Comparison]:
    """Read what `save_all` or `Comparison.save` wrote, now or in an earlier version.

    Raises:
        ValueError: if the file holds something else.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        return [_comparison(each) for each in data.get("comparisons", [data])]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no comparison: {error}") from error


def _comparison(data: dict[str, Any]) -> Comparison:
    rows = tuple(Row(**row) for row in data["rows"])
    pairs = tuple(Pair(**pair) for pair in data.get("pairs", ()))
    layers = tuple(LayerRow(**layer) for layer in data.get("layers", ()))
    return Comparison(**{**data, "rows": rows, "pairs": pairs, "layers": layers})


def environment() -> dict[str, str]:
    """Describe what results depend on besides the code: versions, the processor and its kernels, and the date."""
    import transformers

    return {
        "date": date.today().isoformat(),
        "tessera": VERSION,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "kernels": " ".join(cpu.levels()) or "none built",
        "threads": str(torch.get_num_threads()),
    }


def processor() -> str:
    """Name of the processor, if the system reports it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
