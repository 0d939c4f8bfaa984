"""Statistics of key channels: how wide each channel of a head's keys is, and how large the queries are in it.

The error e of a key changes scores by q·e. Let w be the root mean square of a channel's queries and s that of its keys about
their mean. Channels are multiplied by w^¼·s^-¾ before a codec rotates and quantises them, and the weight of a squared error of
the scaled channel is (w·s)^1½. For a codec with evenly spread errors √(w/s) would be optimal, and for one that steers its
errors (`Codec.encode`) s^-1, which makes all channels equally wide; the best measured exponent is between the two. If a model's
keys are rescaled channel by channel, and its queries inversely, the products w·s stay the same and the widths compensate, so
that the codec gets the same vectors.

A rotary embedding rotates pairs of channels, by an angle that grows with every token, so both channels of a pair get their
mean.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import save_file
from torch import Tensor

from tessera.devices import upload
from tessera.files import WHOLE, atomic_path, brief, open_tensors

#: Steps per octave of a width, the number of steps, and the step of width 1. Few steps are above it: widened keys must still
#: fit half precision, in which their means are kept.
STEPS, WIDTHS, ONE = 2, 32, 21
#: Number of octaves of the products w·s that are distinguished, from the largest down.
PRODUCTS = 8
#: Tokens of a group over which keys are centred before their spread is measured.
GROUP = 64
#: Largest half-precision number, in which means of keys are kept.
HALF_MAX = 65504.0
#: The name of the format in a file's header.
FORMAT = "1"


@dataclass(frozen=True, eq=False)
class KeyStats:
    """Statistics of the key channels of one layer, one byte for each.

    Attributes:
        sizes: (batch, kv_heads, head_dim) uint8: `WIDTHS` steps of the width, then three bits for the product w·s.
    """

    sizes: Tensor

    @property
    def widths(self) -> Tensor:
        """The factors of key channels before quantisation: (batch, kv_heads, head_dim) float32."""
        return torch.exp2(((self.sizes >> 3).float() - ONE) / STEPS)

    @property
    def narrowing(self) -> Tensor:
        """One over the widths; computed from the bytes, so that nothing is kept besides them."""
        return torch.exp2((ONE - (self.sizes >> 3).float()) / STEPS)

    @property
    def table(self) -> Tensor:
        """One over the width of each byte value: (256,) float32 on the CPU."""
        return _TABLE

    @property
    def weights(self) -> Tensor:
        """The weight of a squared error of a widened key: of the widths' shape, at most 1."""
        return torch.exp2(-1.5 * (self.sizes & 7).float())

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return self.sizes.numel()

    def select(self, rows: Tensor) -> KeyStats:
        """Batch rows by index; a row may be taken more than once. rows: (n,) int64."""
        return KeyStats(self.sizes[upload(rows, self.sizes.device)])

    def to(self, device: torch.device | str) -> KeyStats:
        """Return a copy on another device."""
        return KeyStats(self.sizes.to(device))

    def check(self, kv_heads: int, head_dim: int) -> None:
        """Refuse statistics of keys of another shape.

        Raises:
            ValueError: naming both shapes.
        """
        if self.sizes.ndim != 3 or tuple(self.sizes.shape[1:]) != (kv_heads, head_dim) or self.sizes.dtype != torch.uint8:
            raise ValueError(
                f"statistics {tuple(self.sizes.shape)} in {self.sizes.dtype} do not fit {kv_heads} key heads of {head_dim}"
            )

    @staticmethod
    def measure(queries: Tensor, keys: Tensor, partner: Sequence[int] | None = None) -> KeyStats:
        """Measure the statistics of some tokens.

        Args:
            queries: (batch, kv_heads, n, head_dim) float32, of n tokens the mean squares over the query heads of a key head.
            keys: (batch, kv_heads, tokens, head_dim); these need not be the same tokens.
            partner: for each channel the other one of its rotary pair, itself if there is none; None: no rotary embedding.
        """
        keys = keys.float()
        square, tokens = torch.zeros_like(keys[:, :, 0]), keys.shape[2]
        for part in keys.split(GROUP, dim=2):
            square = square + (part - part.mean(2, keepdim=True)).square().sum(2)
        # Numbers that are not finite are left out; one such query must not decide how all later keys are quantised.
        w, s = torch.nan_to_num(queries.float(), 0.0, 0.0, 0.0).mean(2), torch.nan_to_num(square / tokens, 0.0, 0.0, 0.0)
        largest = torch.nan_to_num(keys.abs().amax(2), 0.0, 0.0, 0.0)
        if partner is not None:
            index = upload(torch.tensor(partner), keys.device)
            w, s = (w + w[..., index]) / 2, (s + s[..., index]) / 2
            largest = torch.maximum(largest, largest[..., index])
        # Half of log2 of the mean squares. A channel that never varies, or that no query uses, gets a small value.
        w, s = (0.5 * x.clamp(min=x.amax(-1, keepdim=True) * 2.0**-40).clamp(min=2.0**-100).log2() for x in (w, s))
        width, product = 0.25 * w - 0.75 * s, w + s
        width = (width - width.mean(-1, keepdim=True)) * STEPS
        # Widened keys must stay in the range of half precision, with room for larger ones later.
        room = ((HALF_MAX / 4 / largest.clamp(min=1e-30)).log2() * STEPS).floor()
        code = (torch.minimum(width.round(), room) + ONE).clamp(0, WIDTHS - 1)
        below = (product.amax(-1, keepdim=True) - product).round().clamp(0, PRODUCTS - 1)
        return KeyStats((8 * code + below).to(torch.uint8))


_TABLE = KeyStats(torch.arange(256, dtype=torch.uint8)).narrowing


def save_stats(stats: Sequence[KeyStats | None], path: str | os.PathLike[str]) -> None:
    """Write the statistics of a model's layers to a safetensors file; None: of a layer that has none."""
    tensors = {f"{layer}": found.sizes.cpu().clone() for layer, found in enumerate(stats) if found is not None}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"tessera_key_stats": FORMAT, "layers": str(len(stats))})


def load_stats(path: str | os.PathLike[str]) -> list[KeyStats | None]:
    """Load what `save_stats` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is something else, or damaged.
    """
    with open_tensors(path, "is no file of key statistics") as file:
        found, count = file.metadata.get("tessera_key_stats"), file.metadata.get("layers", "")
        if found != FORMAT:
            raise ValueError(f"{os.fspath(path)} is no file of key statistics: its header says {brief(found)}, not {FORMAT!r}")
        names = set(file.names)
        if not count.isdecimal() or len(count) > 6 or not names <= {str(layer) for layer in range(int(count))}:
            what = f"{brief(count)} layers, and statistics of {brief(sorted(names)[:3])}"
            raise ValueError(f"{os.fspath(path)} is damaged: {what}")
        stats = [KeyStats(file.get(str(layer))) if str(layer) in names else None for layer in range(int(count))]
    for layer, one in enumerate(stats):
        if one is not None and (one.sizes.dtype != torch.uint8 or one.sizes.ndim != 3 or len(one.sizes) != 1):
            what = brief(f"layer {layer} is {one.sizes.dtype} of shape {tuple(one.sizes.shape)}", WHOLE)
            raise ValueError(f"{os.fspath(path)} is damaged: {what}")
    return stats
