"""The retention policy of one layer of a cache, derived from the spec and the window of the layer's attention."""

from __future__ import annotations

from dataclasses import dataclass, field

from tessera.codecs import Codec
from tessera.codecs.channel_stats import KeyStats
from tessera.finite import FiniteCheck
from tessera.tiers.offload import Store
from tessera.tiers.spec import Spec


@dataclass(frozen=True)
class RetentionPolicy:
    """What one layer keeps, derived from the spec and the window of the model's layer.

    Attributes:
        sink: number of first tokens kept for ever.
        recent: number of newest tokens kept exactly; None: all.
        codecs: codecs of the tokens in between, from the newest to the oldest, each with its limit in tokens or None; without
            codecs these tokens are dropped.
        window: a query sees only this many newest tokens, itself included, and the sinks; None: all that are kept.
        tensor_cache: what leaves the window, or the last codec, is written into the model's Tensor Cache.
        masked: the window is that of the model's own layer, so that the model's mask has it already.
        by_document: each packed document has a window and sinks of its own, as if it were alone.
        stats: statistics of the keys, if they were given; None: measured on the first tokens, if the codec uses them.
        partner: for each channel of the keys the other one of its rotary pair; None: no rotary embedding.
        store: where whole pages of quantised tokens go; None: they stay where the model computes.
        tops: for each codec the number of tokens that a query reads at most; None: all.
        finite: the check for finite numbers that all layers of a cache share.
        others: the words of tiers that were added to the grammar, which stand behind the codecs.
    """

    sink: int
    recent: int | None
    codecs: tuple[tuple[Codec, int | None], ...]
    window: int | None
    tensor_cache: bool = False
    masked: bool = False
    by_document: bool = False
    stats: KeyStats | None = None
    partner: tuple[int, ...] | None = None
    others: tuple[str, ...] = ()
    tops: tuple[int | None, ...] = ()
    store: Store | None = None
    finite: FiniteCheck = field(default_factory=FiniteCheck, compare=False)

    @staticmethod
    def of(
        spec: Spec,
        codecs: tuple[Codec, ...],
        sliding: int | None,
        memory: bool = True,
        stats: KeyStats | None = None,
        partner: tuple[int, ...] | None = None,
        store: Store | None = None,
        finite: FiniteCheck | None = None,
    ) -> RetentionPolicy:
        """Derive the policy of one layer.

        Args:
            spec: specification of the cache.
            codecs: codecs of the spec, in its order.
            sliding: tokens that the layer's own attention sees; None: all.
            memory: whether "tc" has given the layer a Tensor Cache.
            stats, partner, store, finite: see `RetentionPolicy`.
        """
        window = min((w for w in (spec.window, sliding) if w is not None), default=None)
        if spec.tensor_cache and sliding is not None:
            window = sliding  # a layer with a sliding window is bounded already; it gets no memory
        # A layer never sees tokens outside its own window, so sinks would be useless.
        sink = 0 if sliding is not None else spec.sink
        recent: int | None = None if spec.dense else spec.recent
        if window is not None:
            recent = window - 1 if spec.window is not None or recent is None else min(recent, window - 1)
        tensor_cache = spec.tensor_cache and sliding is None and memory
        if tensor_cache and window is not None:
            recent = window  # the pair that leaves at a step is still needed for its write
        masked = sliding is not None and window == sliding
        by_document = spec.window is not None and sliding is None
        limits = [limit for _, limit in spec.codecs]
        if spec.tensor_cache and sliding is not None and limits:
            limits[-1] = None  # likewise: tokens that other layers' memories would absorb are kept while the layer sees them
        limited = tuple(zip(codecs, limits, strict=True))
        tops = tuple(spec.top(codec) for codec, _ in spec.codecs)
        others = () if sliding is not None else spec.others
        if not any(codec.weighs for codec in codecs):
            stats = None
        return RetentionPolicy(
            sink,
            recent,
            limited,
            window,
            tensor_cache,
            masked,
            by_document,
            stats,
            partner,
            others,
            tops,
            store,
            FiniteCheck() if finite is None else finite,
        )

    @property
    def weighs(self) -> bool:
        """Whether a codec scales keys by the statistics of queries and keys."""
        return any(codec.weighs for codec, _ in self.codecs)

    @property
    def dissolves(self) -> bool:
        """Whether the Tensor Cache is behind codecs, which pass whole blocks of decoded tokens to it."""
        return self.tensor_cache and bool(self.codecs)

    @property
    def limited(self) -> bool:
        """Whether codecs drop tokens past a limit."""
        return bool(self.codecs) and self.codecs[-1][1] is not None
