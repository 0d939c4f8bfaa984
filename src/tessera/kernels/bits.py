"""Fixed-width integers packed into bytes without gaps."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that hold `count` integers of `bits` bits."""
    return -(-count * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack integers in [0, 2^bits) along the last axis, little-endian within and across bytes.

    Args:
        codes: (..., n), any integer dtype.
        bits: 1 to 24.

    Returns:
        (..., ceil(n · bits / 8)) uint8.
    """
    if not codes.numel():
        # No integers, for which there are no tables.
        return codes.new_zeros((*codes.shape[:-1], packed_bytes(codes.shape[-1], bits)), dtype=torch.uint8)
    if bits == 8:
        return codes.to(torch.uint8)
    if bits == 16:
        pair = torch.stack((codes & 255, codes >> 8), dim=-1)
        return pair.flatten(-2).to(torch.uint8)
    n = codes.shape[-1]
    size = packed_bytes(n, bits)
    # An integer of b bits that starts inside a byte touches at most ceil((b + 7) / 8) bytes. Integers do not overlap, so
    # adding their parts is the same as or-ing them.
    out = torch.zeros(*codes.shape[:-1], size + (bits + 14) // 8, dtype=torch.int32, device=codes.device)
    start = torch.arange(n, device=codes.device) * bits
    shifted = codes.long() << (start & 7)
    for byte in range((bits + 14) // 8):
        part = (shifted >> (8 * byte) & 255).int()
        out.index_add_(-1, (start >> 3) + byte, part)
    return out[..., :size].to(torch.uint8)


def unpack_bits(data: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_bits`: (..., bytes) uint8 -> (..., count) int64."""
    if not data.numel():
        return data.new_zeros((*data.shape[:-1], count), dtype=torch.long)
    if bits == 8:
        return data[..., :count].long()
    if bits == 16:
        wide = data.long()
        return (wide[..., 0::2] | wide[..., 1::2] << 8)[..., :count]
    start = torch.arange(count, device=data.device) * bits
    span = (bits + 14) // 8
    padded = torch.nn.functional.pad(data, (0, span))
    value = torch.zeros(*data.shape[:-1], count, dtype=torch.long, device=data.device)
    for byte in range(span):
        value |= padded[..., (start >> 3) + byte].long() << (8 * byte)
    return value >> (start & 7) & ((1 << bits) - 1)
