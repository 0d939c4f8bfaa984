"""An example of a user-defined tier: `stride:4` keeps every fourth token that leaves the tier before it, and drops the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.tiers import ExactTier, KVSource, Pairs, Tier
from tessera.tiers.added_tiers import register


class StrideTier(Tier):
    """A tier that keeps the first of every `step` tokens, unquantised."""

    keeps_tokens = False

    def __init__(self, step: int) -> None:
        self.step, self.kept = step, ExactTier()

    @property
    def tokens(self) -> int:
        return self.kept.tokens * self.step

    def append(self, k: Tensor, v: Tensor, place: int) -> Pairs | None:
        return self.kept.append(k[:, :, :: self.step], v[:, :, :: self.step])

    def sources(self, start: int, window: int | None) -> list[KVSource]:
        return [KVSource(each.held, start, self.tokens, unmasked=True) for each in self.kept.sources(start, None)]

    def buffers(self) -> list[Tensor]:
        return self.kept.buffers()

    def select(self, rows: Tensor) -> None:
        self.kept.select(rows)

    def to(self, device: torch.device | str) -> None:
        self.kept.to(device)

    def copied(self) -> StrideTier:
        other = StrideTier(self.step)
        other.kept = self.kept.copied()
        return other

    def tensors(self) -> dict[str, Tensor]:
        return {"k": self.kept.keys, "v": self.kept.values} if self.tokens else {}

    def restore(self, tensors: dict[str, Tensor], rows: int, kv_heads: int, head_dim: int) -> None:
        for x in tensors.values():
            if x.ndim != 4 or (x.shape[0], x.shape[1], x.shape[3]) != (rows, kv_heads, head_dim) or len(tensors) != 2:
                raise ValueError("the file is damaged: the tokens of a stride have another shape")
        if tensors:
            self.kept.append(tensors["k"], tensors["v"])


@register("stride", "stride:4")
def stride(argument: str) -> StrideTier:
    if argument not in ("2", "4", "8", "16", "32", "64"):
        raise ValueError(f"a stride must divide 64, such as 4; got {argument!r}")
    return StrideTier(int(argument))
