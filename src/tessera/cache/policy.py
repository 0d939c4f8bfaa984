"""What one layer of a cache keeps, made from the spec and from what the layer's attention can see."""

from __future__ import annotations

from dataclasses import dataclass, field

from tessera.finite import FiniteCheck
from tessera.cache.offload import Store
from tessera.cache.spec import Spec
from tessera.codecs import Codec
from tessera.codecs.key_stats import KeyStats


@dataclass(frozen=True)
class RetentionPolicy:
    """What a layer keeps, made from the spec and from what the model's layer can see.

    Attributes:
        sink: number of first tokens kept for ever.
        recent: number of newest tokens kept exactly; None: all.
        codecs: for the tokens in between, from the newest to the oldest, each with the number of tokens that it holds at most
            or None; where there are none the tokens are dropped.
        window: a query sees only this many newest tokens, itself included, and the sinks; None: all that are kept.
        tensor_cache: what leaves the window, or the last codec, is written into the model's Tensor Cache.
        masked: the window is that of the model's own layer, so that the model's mask has it already.
        by_document: a document that the mask sets apart begins anew, as it would alone; the window and the sinks are its own.
        stats: how the codec is to see keys, if that was given; None: what the first tokens tell, if the codec weighs at all.
        partner: of each channel of the keys the one that a rotary embedding turns it into; None: nowhere.
        store: where whole pages of quantised tokens go; None: they stay where the model computes.
        tops: for each codec how many of its tokens a query reads at most, or None: all.
        finite: shared by all layers of a cache: whether what they have been given is finite.
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
        """What a layer keeps.

        Args:
            spec: of the cache.
            codecs: of the spec, in its order.
            sliding: tokens that the layer's own attention sees; None: all.
            memory: whether "tc" has given the layer a Tensor Cache.
            stats, partner, store, finite: see `RetentionPolicy`.
        """
        window = min((w for w in (spec.window, sliding) if w is not None), default=None)
        if spec.tensor_cache and sliding is not None:
            window = sliding  # a layer that forgets by itself is bounded already; it gets no memory and stays as it is
        # What lies outside a layer's own window it never sees, so sinks would be of no use to it.
        sink = 0 if sliding is not None else spec.sink
        recent: int | None = None if spec.dense else spec.recent
        if window is not None:
            recent = window - 1 if spec.window is not None or recent is None else min(recent, window - 1)
        tensor_cache = spec.tensor_cache and sliding is None and memory
        if tensor_cache and window is not None:
            recent = window  # the pair that leaves at a step is still needed, to be written
        masked = sliding is not None and window == sliding
        by_document = spec.window is not None and sliding is None
        limits = [limit for _, limit in spec.codecs]
        if spec.tensor_cache and sliding is not None and limits:
            limits[-1] = None  # likewise: what a memory would have absorbed elsewhere is kept while the layer sees it
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
        """Whether a codec sees keys as queries do."""
        return any(codec.weighs for codec, _ in self.codecs)

    @property
    def dissolves(self) -> bool:
        """Whether the Tensor Cache is behind codecs, which give it whole blocks of what they held."""
        return self.tensor_cache and bool(self.codecs)

    @property
    def limited(self) -> bool:
        """Whether codecs drop tokens that are too many for them."""
        return bool(self.codecs) and self.codecs[-1][1] is not None
