"""HQMQ with a joint codebook of direction and radius: the codec of `hqmq:3`, `hqmq:4` and `hqmq:5`.

HQMQ (arXiv 2605.27646) codes a chunk of four numbers as a direction, the product q_p·q_s of one of the 24 Hurwitz units
and a unit quaternion, and a radius beside it. Here the secondary quaternion need not be a unit: its length is the radius.
That is the same product, and the same decoder less one multiplication, but the codewords can follow a Gaussian density: fewer
directions near the origin and far out, radii that differ from one direction to the next. Deviations from the paper, each of
which lowers the error (benchmarks/codec_error.py):

- the codebook: one, optimised without data, shared by all heads and layers; all bits of a code are used;
- the vector is rotated first (`rotation`), which makes chunks nearly Gaussian;
- the scale is the root mean square of the vector, in one byte (`logscale`), not its largest radius in two;
- keys are centred, and wide channels narrowed, over groups of 64 tokens (`precondition`);
- a cache scales key channels by statistics of queries and keys (`key_stats`), and errors are steered to channels where they
  count less (`feedback`);
- values are multiplied by 1 / (1 - D). The nearest codeword of an optimised codebook is on average shorter than the chunk by a
  share equal to the error D. Averaging values in attention cancels their errors but not this common shrinkage; their own
  squared error grows by the factor 1 + D.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from tessera.codecs import logscale, precondition
from tessera.codecs.base import Codec, Layout, Packed, Role, check_codes, group_index
from tessera.codecs.chunks import from_chunks
from tessera.codecs.codebooks import JOINT_BITS, joint, joint_shape
from tessera.codecs.feedback import feedback
from tessera.codecs.rotation import rotation, rotation_factors
from tessera.kernels import dispatch
from tessera.kernels.bits import pack_bits, packed_bytes, unpack_bits
from tessera.kernels.joint import JointFormat
from tessera.kernels.nearest import Codewords
from tessera.quaternion import UNITS

#: Tokens that share the means of their key channels.
GROUP = 64


class JointHQMQ(Codec):
    """HQMQ whose secondary quaternions contain the radius.

    True bits per element: b + 8/d for values, b + 8/d + 1/4 for keys; at head_dim 64, 4.125 and 4.375 for b = 4.

    Args:
        bits: bits per number, a quarter of the bits of a chunk's code: 2, 2.5, 3, 3.5, 4, 4.5 or 5.
        rotate: rotate vectors first.
        centre: centre keys over groups of `GROUP` tokens.
        stats: a cache multiplies keys by widths from statistics, see `key_stats`; requires the other two.
    """

    fields: Mapping[str, Layout] = {"codes": "token", "scale": "token", "centre": "group"}

    def __init__(self, bits: float = 4, *, rotate: bool = True, centre: bool = True, stats: bool = True) -> None:
        if 4 * bits not in JOINT_BITS:
            raise ValueError(f"hqmq takes {', '.join(f'{b / 4:g}' for b in JOINT_BITS)} bits, got {bits:g}")
        self.bits, self.rotate, self.centre = bits, rotate, centre
        self.code_bits = int(4 * bits)
        self.group = GROUP if centre else 1
        self.weighs = stats and rotate and centre
        self.summarises = centre
        self.revision = 2 if joint_shape(self.code_bits)[1] else 1  # revision 2 changed the order of the representatives
        words = (("norot", rotate), ("nocentre", centre), ("nostats", self.weighs or not (rotate and centre)))
        self.spec = "_".join((f"hqmq:{bits:g}", *(word for word, has in words if not has)))

    def kernel_format(self, dim: int) -> JointFormat:
        """See `JointFormat`."""
        return _format(self.code_bits, dim if self.rotate else 0, self.group)

    def kept(self, heads: int, dim: int, role: Role) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See `Codec`."""
        fields = {
            "codes": ((packed_bytes(-(-dim // 4), self.code_bits),), torch.uint8),
            "scale": ((), torch.uint8),
            "centre": ((dim,), torch.int16),
        }
        if not self.centre or role != "key":
            del fields["centre"]
        return fields

    def summary(self, pages: Sequence[Packed]) -> tuple[Tensor, Tensor]:
        """See `Codec`."""
        centres, scales = (torch.cat([page.tensors[name] for page in pages], 2) for name in ("centre", "scale"))
        # A larger byte is a larger scale.
        return precondition.means(centres), logscale.from_byte(scales.unflatten(2, (-1, self.group)).amax(3))

    def check(self, packed: Packed) -> None:
        """See `Codec`."""
        count = UNITS * joint_shape(self.code_bits)[0] * (12 if joint_shape(self.code_bits)[1] else 1)
        check_codes(packed, self.code_bits, count)
        if "centre" in packed.tensors and not precondition.unpack(packed.tensors["centre"])[0].isfinite().all():
            raise ValueError(f"field 'centre' of {packed.describe()} is damaged: it has numbers that are not finite")

    def _encode(self, x: Tensor, role: Role, layer: int) -> dict[str, Tensor]:
        return self._coded(x, role, None)

    def _encode_weighed(self, x: Tensor, role: Role, layer: int, weights: Tensor) -> dict[str, Tensor]:
        # A last chunk that is filled up with zeros would need a metric of its own.
        return self._coded(x, role, weights if x.shape[-1] % 4 == 0 else None)

    def _coded(self, x: Tensor, role: Role, weights: Tensor | None) -> dict[str, Tensor]:
        centred, book = self.centre and role == "key", words_of(self.code_bits)
        if (found := dispatch.encode_joint(x, self.kernel_format(x.shape[-1]), book, centred, weights)) is not None:
            return found
        tensors = {}
        if centred:
            tensors["centre"] = precondition.fit(x, self.group)
            index = _groups(x.shape[2], self.group, x.device)
            x = precondition.apply(x, tensors["centre"], index)
        if self.rotate:
            x = x @ rotation(x.shape[-1], device=x.device).T
        scale = logscale.to_byte(x.square().mean(-1).sqrt())
        codes = self._codes(x, logscale.from_byte(scale), weights)
        return {"codes": codes, "scale": scale, **tensors}

    def _codes(self, x: Tensor, scale: Tensor, weights: Tensor | None) -> Tensor:
        book = words_of(self.code_bits)
        if weights is not None:
            live = scale > 0  # vectors of zeros: any code will do, and the search near the origin is slow
            y = torch.where(live.unsqueeze(-1), x / scale.clamp(min=1e-30).unsqueeze(-1), 1.0)
            upper = feedback(weights, rotation(x.shape[-1], device=x.device))
            found = dispatch.encode_feedback(y.flatten(0, 1), upper.flatten(0, 1), book)
            return pack_bits(found.view(*x.shape[:-1], -1).masked_fill(~live.unsqueeze(-1), 0), self.code_bits)
        return dispatch.pack_nearest(x, scale, book, self.code_bits)

    def decode_reference(self, packed: Packed) -> Tensor:
        """See `Codec`."""
        dim = packed.shape[-1]
        codes = unpack_bits(packed.tensors["codes"], self.code_bits, -(-dim // 4))
        words = _codewords(self.code_bits, packed.device)
        x = from_chunks(words[codes], dim) * logscale.from_byte(packed.tensors["scale"]).unsqueeze(-1)
        if packed.role == "value":
            x = x * self.kernel_format(dim).value_gain
        if self.rotate:
            x = x @ rotation(dim, device=packed.device)
        if "centre" in packed.tensors:
            x = precondition.invert(x, packed.tensors["centre"], group_index(packed))
        return x


@cache
def _format(code_bits: int, rotated_dim: int, group: int) -> JointFormat:
    book = joint(code_bits)
    permutation, sign = book.signed_permutations
    dct, signs = (
        rotation_factors(rotated_dim)
        if rotated_dim
        else (torch.ones(1, 1, dtype=torch.float32), torch.ones(0, dtype=torch.float32))
    )
    return JointFormat(
        bits=code_bits,
        permutation_bits=(len(sign) - 1).bit_length(),
        step=book.step,
        value_gain=1 / (1 - book.nmse),
        representatives=book.representatives,
        permutation=permutation,
        sign=sign,
        scales=logscale.from_byte(torch.arange(256, dtype=torch.uint8)),
        group=group,
        dct=dct,
        signs=signs,
    )


def _groups(tokens: int, group: int, device: torch.device) -> Tensor:
    return torch.arange(tokens, device=device) // group


@cache
def _codewords(code_bits: int, device: torch.device) -> Tensor:
    book = joint(code_bits)
    return (book.codewords.float() * book.step).to(device)


@cache
def words_of(code_bits: int) -> Codewords:
    """Return the joint codebook in the form that the search for the nearest codeword takes."""
    book = joint(code_bits)
    return Codewords(book.products, book.step, book.conjugations, book.codes)
