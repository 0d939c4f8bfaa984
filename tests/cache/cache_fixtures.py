"""The codecs that the tests of the cache run with, and a codec that exists for tests only."""

from __future__ import annotations

import torch
from torch import Tensor

from tessera import codecs
from tessera.codecs import Codec, Packed, Role, registry


class Grouped(Codec):
    """8 bits with one scale for each channel of a group of 32 tokens, so that what is encoded together matters."""

    spec = "grouped:8"
    group = 32
    fields = {"codes": "token", "scale": "group"}  # noqa: RUF012

    def _encode(self, x: Tensor, role: Role, layer: int) -> dict[str, Tensor]:
        batch, heads, tokens, dim = x.shape
        pad = -tokens % self.group
        groups = torch.nn.functional.pad(x, (0, 0, 0, pad)).view(batch, heads, -1, self.group, dim)
        scale = groups.abs().amax(3).clamp(min=1e-8) / 127
        codes = (groups / scale.unsqueeze(3)).round().to(torch.int8)
        return {"codes": codes.view(batch, heads, -1, dim)[:, :, :tokens].contiguous(), "scale": scale}

    def decode_reference(self, packed: Packed) -> Tensor:
        index = (torch.arange(packed.tokens) + packed.offset) // self.group
        return packed.tensors["codes"].float() * packed.tensors["scale"][:, :, index]


GROUPED = Grouped.spec
if "grouped" not in codecs.names():
    registry.register("grouped", (GROUPED,))(lambda argument: Grouped())

#: One specification of each kind of codec, and the tests' own.
CODECS = [GROUPED, *(spec for spec in ("int:4", "kivi:4", "hqmq:4") if spec.split(":")[0] in codecs.names())]
