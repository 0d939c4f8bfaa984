"""The definition of encoding with error feedback from a vector's later chunks to its earlier ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tessera.kernels.nearest import CellIndex, Codewords, nearest
from tessera.kernels.precision import without_autocast


@without_autocast
def encode_feedback(
    y: Tensor, feedback: Tensor, book: Codewords, search: Callable[[Tensor, CellIndex], Tensor] | None = None
) -> Tensor:
    """Encode chunks of four from the last to the first, each minus the feedback of the errors of those already encoded.

    Chunk i is encoded as t_i = y_i - sum over j > i of F_ij·e_j, where F_ij is the feedback's block of 4 x 4 numbers in
    rows i and columns j, and e_j is the decoded chunk j minus y_j.

    Args:
        y: (heads, vectors, d) float32, divided by its scales; d is a multiple of four.
        feedback: (heads, d, d) float32, of which only the blocks above the diagonal are read.
        book: the codebook.
        search: see `tessera.kernels.pack.nearest_codes`.

    Returns:
        (heads, vectors, d / 4) int64, codes of the nearest codewords of the t_i.
    """
    heads, vectors, dim = y.shape
    codes = torch.empty(heads, vectors, dim // 4, dtype=torch.long, device=y.device)
    index, numbers = book.index_on(y.device), book.codes_on(y.device)
    error = torch.zeros_like(y)
    for chunk in reversed(range(dim // 4)):
        here, later = slice(4 * chunk, 4 * chunk + 4), slice(4 * chunk + 4, dim)
        target = y[..., here] - error[..., later] @ feedback[:, here, later].transpose(1, 2)
        found = (search or nearest)(target.reshape(-1, 4), index).view(heads, vectors)
        error[..., here] = index.words[found] - y[..., here]
        codes[..., chunk] = numbers[found]
    return codes
