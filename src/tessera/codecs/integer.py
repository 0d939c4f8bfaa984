"""Uniform integer codecs, the usual baselines: ``int:b``, one scale per vector, and ``kivi:b``, KIVI's groups."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from tessera.codecs.base import Codec, Layout, Packed, Role, group_index
from tessera.codecs.precondition import split_groups
from tessera.codecs.registry import register
from tessera.codecs.scalar_format import scalar_format
from tessera.kernels import dispatch
from tessera.kernels.bits import unpack_bits
from tessera.kernels.scalars import ScalarFormat

HALF_MAX = 65504.0
#: Smallest half-precision number that is not zero; a divisor in the place of zero.
HALF_LEAST = 2.0**-24
#: Numbers that share a scale and a zero in `Kivi`: tokens of a key channel, channels of a value.
GROUP = 32


class Int(Codec):
    """Symmetric round-to-nearest: levels -L..L, L = 2^(b-1) - 1, and the scale max|x| / L per vector in half precision.

    True bits per element: b + 16/d. Scales saturate at the largest half-precision number.

    Args:
        bits: b, 2 to 8.
    """

    fields: Mapping[str, Layout] = {"codes": "token", "scale": "token"}

    def __init__(self, bits: int = 4) -> None:
        if not 2 <= bits <= 8:
            raise ValueError(f"int takes 2 to 8 bits, got {bits}")
        self.bits = bits
        self.most = 2 ** (bits - 1) - 1
        self.spec = f"int:{bits}"

    def _encode(self, x: Tensor, role: Role, layer: int) -> dict[str, Tensor]:
        scale = (x.abs().amax(-1, keepdim=True) / self.most).clamp(max=HALF_MAX).half()
        # Divide by the scale as it will be decoded, so that its rounding causes no error.
        divisor = scale.float().clamp(min=HALF_LEAST)
        limits = (-self.most, self.most)
        codes = dispatch.pack_linear(x, None, divisor, limits, self.bits, group=1, span=max(2, x.shape[-1]))
        return {"codes": codes, "scale": scale.squeeze(-1)}

    def kernel_format(self, dim: int) -> ScalarFormat:
        """See `ScalarFormat`."""
        return _int_format(self.bits)

    def decode_reference(self, packed: Packed) -> Tensor:
        """See `Codec`."""
        q = unpack_bits(packed.tensors["codes"], self.bits, packed.shape[-1]) - self.most
        return q * packed.tensors["scale"].float().unsqueeze(-1)


class Kivi(Codec):
    """KIVI (arXiv 2402.02750): keys in groups of 32 tokens of one channel, values in groups of 32 channels of one token.

    A group keeps its minimum and a scale, (max - min) / (2^b - 1), in half precision. An incomplete group, of tokens or of
    channels, also keeps both. KIVI keeps the newest tokens unquantised; here the cache does that ("recent").

    True bits per element: b + 1 where 32 divides the tokens of keys and the head_dim of values.

    Args:
        bits: b, 2 to 8.
    """

    fields: Mapping[str, Layout] = {
        "codes": "token",
        "key_min": "group",
        "key_scale": "group",
        "value_min": "token",
        "value_scale": "token",
    }
    group = GROUP

    def __init__(self, bits: int = 4) -> None:
        if not 2 <= bits <= 8:
            raise ValueError(f"kivi takes 2 to 8 bits, got {bits}")
        self.bits = bits
        self.spec = f"kivi:{bits}"

    def _encode(self, x: Tensor, role: Role, layer: int) -> dict[str, Tensor]:
        tokens, dim = x.shape[2:]
        if role == "key":
            groups = split_groups(x, GROUP) if tokens else x.unflatten(2, (0, GROUP))  # (b, h, groups, 32, d)
            axis = 3
        else:
            # Padded with the last channel, which changes neither end of its group.
            groups = torch.cat((x, x[..., -1:].expand(*x.shape[:-1], -dim % GROUP)), -1).unflatten(-1, (-1, GROUP))
            axis = 4
        low = groups.amin(axis).clamp(-HALF_MAX, HALF_MAX).half()
        scale = (groups.amax(axis) - low.float()) / (2**self.bits - 1)
        scale = scale.clamp(0, HALF_MAX).half()
        start, divisor, most = low.float(), scale.float().clamp(min=HALF_LEAST), 2**self.bits - 1
        group, span = (GROUP, 1) if role == "key" else (1, GROUP)
        codes = dispatch.pack_linear(x, start, divisor, (0, most), self.bits, group=group, span=span)
        return {"codes": codes, f"{role}_min": low, f"{role}_scale": scale}

    def kernel_format(self, dim: int) -> ScalarFormat:
        """See `ScalarFormat`."""
        return _kivi_format(self.bits)

    def decode_reference(self, packed: Packed) -> Tensor:
        """See `Codec`."""
        dim = packed.shape[-1]
        low, scale = (packed.tensors[f"{packed.role}_{name}"].float() for name in ("min", "scale"))
        if packed.role == "key":
            index = group_index(packed)
            low, scale = low[:, :, index], scale[:, :, index]
        else:
            low, scale = (t.repeat_interleave(GROUP, -1)[..., :dim] for t in (low, scale))
        return unpack_bits(packed.tensors["codes"], self.bits, dim) * scale + low


@cache
def _int_format(bits: int) -> ScalarFormat:
    return scalar_format("uniform", bits, {"codes": "codes", "scale": "scale"}, zero=2 ** (bits - 1) - 1)


@cache
def _kivi_format(bits: int) -> ScalarFormat:
    keys, values = ({"codes": "codes", "scale": f"{role}_scale", "low": f"{role}_min"} for role in ("key", "value"))
    return scalar_format("groups", bits, keys, values)


def _bits(argument: str) -> int:
    if not argument.isdecimal():
        raise ValueError(f"the number of bits must be a whole number, got {argument!r}")
    return int(argument)


@register("int", ("int:4",))
def _int(argument: str) -> Codec:
    return Int(_bits(argument))


@register("kivi", ("kivi:4",))
def _kivi(argument: str) -> Codec:
    return Kivi(_bits(argument))
