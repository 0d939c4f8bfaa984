"""The definitions, in PyTorch, of encoding numbers and packing codes into bytes. Kernels give the same bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from tessera.kernels.bits import pack_bits
from tessera.kernels.nearest import CellIndex, Codewords, nearest


def nearest_codes(x: Tensor, book: Codewords, search: Callable[[Tensor, CellIndex], Tensor] | None = None) -> Tensor:
    """Codes of the nearest codewords.

    Args:
        x: (n, 4) float32, finite.
        book: the codebook, on the CPU.
        search: what finds them in an index; None: `tessera.kernels.nearest.nearest`.

    Returns:
        (n,) int64. Where two codewords are equally near to within rounding, either.
    """
    return book.codes_on(x.device)[(search or nearest)(x, book.index_on(x.device))]


def pack_nearest(
    x: Tensor, scale: Tensor, book: Codewords, bits: int, search: Callable[[Tensor, CellIndex], Tensor] | None = None
) -> Tensor:
    """Packed codes of the codewords nearest to the chunks of vectors.

    Args:
        x: (..., d) float32, finite; the last chunk is filled up with zeros.
        scale: (...), what the vectors are divided by; where it is zero the codes are zero.
        book: the codebook.
        bits: width of a code, in bits.
        search: see `nearest_codes`.

    Returns:
        (..., bytes) uint8, as `tessera.kernels.bits.pack_bits` has them.
    """
    chunks = pad(x / scale.clamp(min=1e-30).unsqueeze(-1), (0, -x.shape[-1] % 4)).unflatten(-1, (-1, 4))
    # Vectors of zeros: any code will do, and the search near the origin is slow. Which they are the host need not know.
    live = (scale > 0).unsqueeze(-1)
    found = nearest_codes(torch.where(live.unsqueeze(-1), chunks, 1.0).reshape(-1, 4), book, search)
    return pack_bits(found.view(chunks.shape[:-1]).int().masked_fill(~live, 0), bits)


def pack_linear(
    x: Tensor, low: Tensor | None, scale: Tensor, limits: tuple[int, int], bits: int, group: int, span: int
) -> Tensor:
    """Packed codes round((x - low) / scale), between limits and counted from the lower.

    Args:
        x: (..., tokens, d) float32.
        low, scale: (..., ceil(tokens / group), ceil(d / span)) float32; low None: zero, if span is not 1.
        limits: whole numbers.
        bits: width of a code in bits, 1 to 8.
        group, span: tokens and channels that share a low and a scale.

    Returns:
        (..., tokens, bytes) uint8.
    """
    tokens, dim = x.shape[-2:]

    def spread(shared: Tensor) -> Tensor:
        return shared.repeat_interleave(group, -2)[..., :tokens, :].repeat_interleave(span, -1)[..., :dim]

    codes = ((x if low is None else x - spread(low)) / spread(scale)).round().clamp(*limits)
    return pack_bits(codes.long() - limits[0], bits)


def pack_levels(x: Tensor, divisor: Tensor, factor: float, bounds: Tensor, values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Packed numbers of the intervals in which x / divisor * factor lies.

    Args:
        x: (..., d) float32.
        divisor: (..., 1).
        factor: see above.
        bounds: (2^bits - 1,) float32, between the intervals, ascending; an interval includes its upper bound.
        values: (2^bits,) float32, one for each interval.
        bits: width of a code in bits, 1 to 8.

    Returns:
        The codes (..., bytes) uint8, and their values (..., d).
    """
    found = torch.bucketize(x / divisor * factor, bounds)
    return pack_bits(found, bits), values[found]


def pack_blocks(x: Tensor, ratio: Tensor, scale: Tensor, bits: int) -> Tensor:
    """ggml's blocks q4_0 or q8_0, see `tessera.codecs.blocks`.

    Args:
        x: (..., 32) float32.
        ratio: (..., 1) float32, what the numbers are multiplied by.
        scale: (..., 1) float16, what the block keeps.
        bits: 4 or 8.

    Returns:
        (..., 2 + 4 bits) uint8.
    """
    product = x * ratio
    if bits == 4:
        q = (product + 8.5).floor().clamp(max=15).to(torch.uint8)
        codes = q[..., :16] | q[..., 16:] << 4
    else:
        whole = product.trunc()
        q = whole + torch.where((product - whole).abs() >= 0.5, product.sign(), 0.0)
        codes = q.to(torch.int8).view(torch.uint8)
    return torch.cat((scale.view(torch.uint8), codes), -1)
