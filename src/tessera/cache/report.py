"""The report of a cache's bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class CacheReport:
    """Bytes of a cache, counted from its tensors.

    Attributes:
        spec: specification of the cache.
        nbytes: bytes of all tensors that are held, the free room of buffers included.
        tiers: the same by tier: "sink", the codec's spec, "recent" ("window" or "dense" where that is the spec), "tc",
            "tm" (what an attached Tensor Memory keeps of the sequences), "staged".
        tier_bits: true bits per element of each tier that holds tokens.
        elements: elements of keys and values that are held in any form.
        bits_per_element: 8 · nbytes / elements.
        tokens: slots that the cache has seen, padding included.
        dense_nbytes: what transformers' `DynamicCache` would hold for the same tokens.
        compression: dense_nbytes / nbytes.
        offloaded: the part of `nbytes` that is in files, or on the CPU while the model computes elsewhere.
        set_aside: the part of `nbytes` that holds no key or value: free room of buffers, and the statistics of the first tokens
            until keys can be quantised.
        ranks: processes that a tensor-parallel model is spread over; the figures are those of one of them, unless they were
            summed.
        summed: whether the figures are those of all of them.
    """

    spec: str
    nbytes: int
    tiers: dict[str, int]
    tier_bits: dict[str, float]
    elements: int
    bits_per_element: float
    tokens: int
    dense_nbytes: int
    compression: float
    offloaded: int = 0
    set_aside: int = 0
    ranks: int = 1
    summed: bool = False

    @property
    def gain(self) -> str:
        """Say how much smaller than a dense cache; for a context too short to save bytes, how many are set aside."""
        if self.nbytes <= self.dense_nbytes or not self.set_aside:
            return f"{self.compression:.2f}x smaller"
        return f"{_size(self.set_aside)} set aside for tokens to come"

    @staticmethod
    def total(reports: Sequence[CacheReport]) -> CacheReport:
        """Add up the reports of all processes."""
        nbytes, elements = sum(r.nbytes for r in reports), sum(r.elements for r in reports)
        dense = sum(r.dense_nbytes for r in reports)
        tiers = {name: sum(r.tiers.get(name, 0) for r in reports) for name in reports[0].tiers}
        # The number of elements of a tier in a process follows from its bytes and bits.
        held = {
            name: sum(8 * r.tiers[name] / r.tier_bits[name] for r in reports if r.tier_bits.get(name))
            for name in reports[0].tier_bits
            if name in tiers
        }
        return replace(
            reports[0],
            nbytes=nbytes,
            tiers=tiers,
            tier_bits={name: 8 * tiers[name] / count for name, count in held.items() if count},
            elements=elements,
            bits_per_element=8 * nbytes / max(1, elements),
            dense_nbytes=dense,
            compression=dense / max(1, nbytes),
            offloaded=sum(r.offloaded for r in reports),
            set_aside=sum(r.set_aside for r in reports),
            summed=True,
        )

    def __str__(self) -> str:
        lines = [
            f"{self.spec}: {self.tokens} tokens in {_size(self.nbytes)}, {self.bits_per_element:.3f} bits per element, "
            f"{self.gain}, dense: {_size(self.dense_nbytes)}"
            + ("" if self.ranks == 1 else f", in {'all' if self.summed else 'one of'} {self.ranks} processes")
        ]
        width = max((len(name) for name in self.tiers), default=0)
        for name, size in self.tiers.items():
            bits = f"  {self.tier_bits[name]:.3f} bits" if name in self.tier_bits else ""
            lines.append(f"  {name:<{width}}  {_size(size):>10}{bits}")
        if self.offloaded:
            lines.append(f"  of which {_size(self.offloaded)} offloaded")
        return "\n".join(lines)


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
