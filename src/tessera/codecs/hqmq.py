"""HQMQ as the paper defines it, "Hurwitz Quaternion Multiplicative Quantization" (arXiv 2605.27646), and its variants.

A vector is cut into chunks of four numbers. A chunk of radius r and direction u is coded as (p, s) = argmax <u, q_p·q_s> over
the 24 Hurwitz units q_p and S secondary unit quaternions q_s, and a radius code. Deviations from the paper in its own mode
(`HQMQ.paper`): the search is in float32 and a zero vector is safe; bits are whole bits.

Outside the paper's mode: secondaries optimised without data instead of random ones, radius levels that are optimal for
Gaussian chunks instead of uniform ones (both: `codebook`, `radius`), and outliers that are kept out of the scale.
The codec behind ``hqmq:4`` is in `hqmq_joint`.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import Literal

import torch
from torch import Tensor

from tessera.codecs.base import Codec, Layout, Packed, Role, check_codes
from tessera.codecs.chunks import from_chunks, to_chunks
from tessera.codecs.codebooks import optimised_secondary, random_secondary
from tessera.codecs.hqmq_joint import JointHQMQ
from tessera.codecs.lloyd_max import lloyd_max
from tessera.codecs.outliers import OutlierRule, find_outliers
from tessera.codecs.ragged import Fields, marked
from tessera.codecs.registry import register
from tessera.codecs.rotation import rotation, rotation_factors
from tessera.devices import upload
from tessera.kernels import dispatch
from tessera.kernels.bits import pack_bits, packed_bytes, unpack_bits
from tessera.kernels.products import ProductFormat
from tessera.quaternion import UNITS, conjugate, hamilton, right_matrix, units

#: Sizes and radius bits of the paper's configurations; any can be followed by _med3.
PAPER = tuple(f"s{s}_r{b}" for s in (24, 48, 96, 192) for b in (2, 3, 4, 6))
#: Smallest norm of a vector that is not stored as zero. The smallest normal half-precision number.
TINY = 2.0**-14
HALF_MAX = 65504.0
#: Outliers of at most so many tokens are selected when they are first read: until then all their chunks are held.
FEW = 64


class HQMQ(Codec):
    """Direction and radius codes for chunks of four numbers.

    Args:
        secondary: number S of secondary quaternions per codebook.
        radius_bits: bits b_r of a radius code, 1 to 8.
        outliers: the paper's C: chunks of more than C times the median radius are kept in half precision; None: there are no
            outliers.
        codebook: "random", the paper's, drawn for each (layer, head, role); "optimised", one for all, see
            `codebooks.DIRECTION_SIZES`; or unit quaternions (S, 4), shared, or (heads, S, 4).
        radius: "uniform": 2^b_r levels from 0 to the vector's largest radius; "chi": levels that are optimal for Gaussian
            chunks, times the vector's root mean square.
        seed: seed of random codebooks.
        outlier_rule: see `outliers`. With "vector" outliers do not enter the scale; with the others they do, as in the paper.
        rotate: rotate vectors first; never in the paper.
        bf16_search: search as the authors' code does, in bfloat16 (for comparison only).
    """

    fields: Mapping[str, Layout] = {"codes": "token", "scale": "token", "flags": "token", "kept": "ragged"}

    def __init__(
        self,
        secondary: int = 96,
        radius_bits: int = 4,
        outliers: float | None = 3.0,
        codebook: Literal["random", "optimised"] | Tensor = "random",
        radius: Literal["uniform", "chi"] = "uniform",
        seed: int = 0,
        *,
        outlier_rule: OutlierRule = "vector",
        rotate: bool = False,
        bf16_search: bool = False,
    ) -> None:
        if isinstance(codebook, Tensor):
            _check_codebook(codebook)
            secondary = codebook.shape[-2]
            codebook = codebook.detach().float().cpu().clone()
        elif codebook == "optimised":
            optimised_secondary(secondary)  # raises for a size that is not shipped
        elif codebook != "random":
            raise ValueError(f"codebook must be 'random', 'optimised' or a tensor, got {codebook!r}")
        if not 1 <= secondary <= 4096:
            raise ValueError(f"secondary must be 1 to 4096 quaternions, got {secondary}")
        if not 1 <= radius_bits <= 8:
            raise ValueError(f"radius_bits must be 1 to 8, got {radius_bits}")
        if outliers is not None and not outliers > 0:
            raise ValueError(f"outliers must be a positive multiple of the median radius, or None, got {outliers}")
        if radius not in ("uniform", "chi"):
            raise ValueError(f"radius must be 'uniform' or 'chi', got {radius!r}")
        if outlier_rule not in ("vector", "paper", "authors"):
            raise ValueError(f"outlier_rule must be 'vector', 'paper' or 'authors', got {outlier_rule!r}")
        self.secondary, self.radius_bits, self.outliers = secondary, radius_bits, outliers
        self.codebook, self.radius, self.seed = codebook, radius, seed
        self.outlier_rule, self.rotate, self.bf16_search = outlier_rule, rotate, bf16_search
        self.direction_bits = (UNITS * secondary - 1).bit_length()
        self.code_bits = self.direction_bits + radius_bits
        self.by_call = outliers is not None and outlier_rule != "vector"
        self.spec = self._spec()

    @classmethod
    def paper(cls, name: str, seed: int = 0) -> HQMQ:
        """A configuration of the paper by its name, as "s96_r4" or "s24_r6_med3".

        With "_authors" after it, as the authors' released code does it: a search in bfloat16 and a median over the call
        however few chunks it has.
        """
        match = re.fullmatch(r"(s\d+_r\d)(_med3)?(_authors)?", name)
        if not match or match[1] not in PAPER:
            raise ValueError(f"no configuration {name!r} in the paper; there are {', '.join(PAPER)}, and each with _med3")
        size, bits = (int(part[1:]) for part in match[1].split("_"))
        authors = bool(match[3])
        return cls(
            size,
            bits,
            3.0 if match[2] else None,
            seed=seed,
            outlier_rule="authors" if authors else "paper",
            bf16_search=authors,
        )

    def _spec(self) -> str:
        name = f"s{self.secondary}_r{self.radius_bits}"
        simple = not self.rotate and self.radius == "uniform" and self.codebook == "random" and self.seed == 0
        rule = "authors" if self.bf16_search else "paper"
        if simple and name in PAPER and (self.outliers is None or (self.outliers == 3.0 and self.outlier_rule == rule)):
            return f"hqmq:{name}{'_med3' if self.outliers else ''}{'_authors' if self.bf16_search else ''}"
        ours = self.codebook == "optimised" and self.radius == "chi" and self.rotate and not self.bf16_search
        if ours and self.outliers is None:
            return f"hqmq:o{self.secondary}_r{self.radius_bits}"
        book = self.codebook if isinstance(self.codebook, str) else f"tensor{zlib.crc32(self.codebook.numpy().tobytes()):08x}"
        return (
            f"HQMQ({self.secondary}, {self.radius_bits}, outliers={self.outliers}, codebook={book}, radius={self.radius}, "
            f"seed={self.seed}, outlier_rule={self.outlier_rule}, rotate={self.rotate}, bf16_search={self.bf16_search})"
        )

    def secondaries(self, heads: int, role: Role, layer: int) -> Tensor:
        """The codebooks of one layer: (heads, S, 4), or (1, S, 4) where all heads share one."""
        if isinstance(self.codebook, Tensor):
            book = self.codebook if self.codebook.ndim == 3 else self.codebook[None]
            if len(book) not in (1, heads):
                raise ValueError(f"a codebook for {len(book)} heads was given to encode {heads} heads")
            return book
        if self.codebook == "optimised":
            return optimised_secondary(self.secondary)[None]
        return _random(self.secondary, heads, layer, role, self.seed)

    def kept(self, heads: int, dim: int, role: Role) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See `Codec`."""
        if isinstance(self.codebook, Tensor):
            self.secondaries(heads, role, 0)  # raises for another number of heads
        chunks = -(-dim // 4)
        codes = {"codes": ((packed_bytes(chunks, self.code_bits),), torch.uint8), "scale": ((), torch.float16)}
        if self.outliers is None:
            return codes
        return {**codes, "flags": ((packed_bytes(chunks, 1),), torch.uint8), "kept": ((4,), torch.float16)}

    def check(self, packed: Packed) -> None:
        """See `Codec`."""
        super().check(packed)
        check_codes(packed, self.code_bits, UNITS * self.secondary << self.radius_bits)

    def _encode(self, x: Tensor, role: Role, layer: int) -> Mapping[str, Tensor]:
        if self.rotate:
            x = x @ rotation(x.shape[-1], device=x.device).T
        chunks = to_chunks(x)  # (b, h, t, n, 4)
        radii = chunks.norm(dim=-1)
        tensors: dict[str, Tensor] = {}
        later: dict[str, Callable[[], Tensor]] = {}
        inside = torch.ones_like(radii, dtype=torch.bool)
        if self.outliers is not None:
            out = find_outliers(radii, self.outliers, self.outlier_rule)
            tensors["flags"] = pack_bits(out.int(), 1)
            # Ordered by token, batch, head, chunk, so that tokens can be appended and sliced off.
            order = chunks.permute(2, 0, 1, 3, 4)
            order = order.clamp(-HALF_MAX, HALF_MAX).half()
            marks = out.permute(2, 0, 1, 3)
            if marks.numel() and x.shape[2] <= FEW:
                later["kept"] = marked(order.flatten(0, 3), marks.flatten())
            else:
                tensors["kept"] = order[marks]
            if self.outlier_rule == "vector":
                inside = ~out
        scale = self._scale(radii, inside)
        books = upload(self.secondaries(x.shape[1], role, layer), x.device)
        rotations = right_matrix(conjugate(books))
        if self.bf16_search:
            unit = chunks / radii.unsqueeze(-1).clamp(min=1e-8)
            directions, projection = dispatch.nearest_directions(unit.bfloat16(), rotations.bfloat16(), backend="reference")
        else:
            directions, projection = dispatch.nearest_directions(chunks, rotations)
        r = radii if self.radius == "uniform" else projection.clamp(min=0)
        code = self._radius_code(r, scale.float().unsqueeze(-1))
        codes = torch.where((scale > 0).unsqueeze(-1), directions << self.radius_bits | code, 0)
        tensors = {"codes": pack_bits(codes, self.code_bits), "scale": scale, **tensors}
        return Fields(tensors, later) if later else tensors

    def _scale(self, radii: Tensor, inside: Tensor) -> Tensor:
        """Compute the half-precision scale of each vector from the radii that count: (b, h, t)."""
        radii = torch.where(inside, radii, 0.0)
        if self.radius == "uniform":
            scale = radii.amax(-1)
        else:
            scale = (radii.square().sum(-1) / (4 * inside.sum(-1)).clamp(min=1)).sqrt()
        return torch.where(scale < TINY, 0.0, scale).clamp(max=HALF_MAX).half()

    def _radius_code(self, r: Tensor, scale: Tensor) -> Tensor:
        most = 2**self.radius_bits - 1
        ratio = r / scale.clamp(min=TINY)
        if self.radius == "uniform":
            return (ratio * most).round().clamp(0, most).long()
        levels = upload(chi_levels(self.radius_bits), r.device)
        return torch.bucketize(ratio, (levels[1:] + levels[:-1]) / 2)

    def directions(self, heads: int, role: Role, layer: int) -> Tensor:
        """Return the quaternion of each code s · 24 + p: (heads, 24 S, 4), or (1, 24 S, 4) where all heads share them."""
        books = self.secondaries(heads, role, layer)
        return hamilton(units()[None, None], books[:, :, None]).flatten(1, 2)

    def kernel_format(self, dim: int) -> ProductFormat:
        """See `ProductFormat`."""
        return _format(self, dim)

    def levels(self) -> Tensor:
        """Return the radii of radius codes as shares of a vector's scale: (2^b_r,) float32."""
        if self.radius == "uniform":
            return torch.arange(2**self.radius_bits, dtype=torch.float32) / (2**self.radius_bits - 1)
        return chi_levels(self.radius_bits)

    def decode_reference(self, packed: Packed) -> Tensor:
        """See `Codec`."""
        heads, dim = packed.shape[1], packed.shape[3]
        codes = unpack_bits(packed.tensors["codes"], self.code_bits, -(-dim // 4))
        direction, code = codes >> self.radius_bits, codes & (2**self.radius_bits - 1)
        words = upload(self.directions(heads, packed.role, packed.layer), codes.device)
        head = torch.arange(heads, device=codes.device)[:, None, None] if len(words) > 1 else 0
        radius = upload(self.levels(), codes.device)[code]
        radius = radius * packed.tensors["scale"].float().unsqueeze(-1)
        chunks = words[head, direction] * radius.unsqueeze(-1)
        if "flags" in packed.tensors:
            # Indices of a fixed number, because for a mask as index the host would have to know how many are set.
            flags = unpack_bits(packed.tensors["flags"], 1, chunks.shape[3]).bool()
            order = flags.permute(2, 0, 1, 3)
            number = (order.flatten().cumsum(0) - 1).clamp(min=0).view(order.shape).permute(1, 2, 0, 3)
            kept = packed.tensors["kept"].float()
            chunks = torch.where(flags.unsqueeze(-1), kept[number], chunks) if len(kept) else chunks
        x = from_chunks(chunks, dim)
        return x @ rotation(dim, device=x.device) if self.rotate else x


def _check_codebook(book: Tensor) -> None:
    if book.ndim not in (2, 3) or book.shape[-1] != 4 or not book.is_floating_point():
        raise ValueError(f"a codebook must be floating point, (S, 4) or (heads, S, 4); got {tuple(book.shape)}, {book.dtype}")
    if not torch.allclose(book.float().norm(dim=-1), torch.ones((), dtype=torch.float32), atol=1e-3):
        raise ValueError("a codebook must hold unit quaternions")


@lru_cache(maxsize=64)
def _format(codec: HQMQ, dim: int) -> ProductFormat:
    dct, signs = (
        rotation_factors(dim) if codec.rotate else (torch.ones(1, 1, dtype=torch.float32), torch.ones(0, dtype=torch.float32))
    )
    return ProductFormat(codec.code_bits, codec.radius_bits, codec.levels(), codec.directions, dct, signs)


@cache
def _random(size: int, heads: int, layer: int, role: Role, seed: int) -> Tensor:
    return random_secondary(size, heads, layer, role, seed)


@cache
def chi_levels(bits: int) -> Tensor:
    """Lloyd–Max levels for the radius of four Gaussian numbers of unit variance: (2^bits,) float32, ascending.

    The radius has the chi distribution with 4 degrees of freedom, of density r³ exp(-r²/2) / 2.
    """
    levels = lloyd_max(lambda r: r**3 * torch.exp(-r * r / 2) / 2, 0.0, 9.0, 2**bits)
    return levels.float()


@register("hqmq", ("hqmq:3", "hqmq:4", "hqmq:5", "hqmq:k4v3", "hqmq:o170_r4", "hqmq:s96_r4", "hqmq:s96_r4_med3"))
def _parse(argument: str) -> Codec:
    """hqmq:4 is `JointHQMQ`; hqmq:k4.5v3.5 is one with 4.5 bits for keys and one with 3.5 for values; hqmq:s96_r4_med3 is the
    paper's; hqmq:o170_r4 has optimised directions and chi radii."""
    if match := re.fullmatch(r"k(\d+(?:\.\d+)?)v(\d+(?:\.\d+)?)((?:_norot)?(?:_nocentre)?(?:_nostats)?)", argument):
        from tessera.codecs.pair import pair  # imported here so that it is registered, and listed, after all others

        return pair(_parse(match[1] + match[3]), _parse(match[2] + match[3]))
    if re.match(r"[kv]\d", argument):
        raise ValueError(f"bits for keys and bits for values are written k4.5v3.5, got {argument!r}")
    if re.fullmatch(r"\d+(\.\d+)?(_norot)?(_nocentre)?(_nostats)?", argument):
        bits, *off = argument.split("_")
        return JointHQMQ(float(bits), rotate="norot" not in off, centre="nocentre" not in off, stats="nostats" not in off)
    if match := re.fullmatch(r"o(\d+)_r(\d)", argument):
        return HQMQ(int(match[1]), int(match[2]), None, "optimised", "chi", rotate=True)
    return HQMQ.paper(argument)
