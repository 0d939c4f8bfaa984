"""Measure a trained model's losses by stretch of the sequence, with its memory and without; for the language benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tessera.adapters import attached_memory, reading
from tessera.lab.evaluation.language import loss_by_distance, over_stretches
from tessera.tensor_memory import TensorMemoryConfig

GRID = "with a Tensor Memory"
#: Chunks of four tokens, so that a training step costs less than three times one without a memory.
GRID_CONFIG = TensorMemoryConfig(channels=32, chunk=4)


@torch.no_grad()
def measure(model: Any, ids: Tensor, edges: Sequence[int], together: int) -> dict[str, Any]:
    """Return losses by stretch and over several stretches; see `over_stretches`.

    Args:
        model: a causal language model.
        ids: (count, tokens), each sequence read from the beginning.
        edges: ends of the stretches, the last being the length of the sequences.
        together: sequences per call.
    """
    parts = [loss_by_distance(model, part, None, edges) for part in ids.split(together)]
    return over_stretches([sum(values) / len(values) for values in zip(*parts, strict=True)], edges)


def with_and_without(
    model: Any, about: dict[str, Any], ids: Tensor, edges: Sequence[int], together: int
) -> list[dict[str, Any]]:
    """Return a row of a model, and if a memory is attached, one with its reads switched off."""
    model.eval()
    rows = [{**about, **measure(model, ids, edges, together)}]
    if attached_memory(model) is not None:
        reading(model, False)
        rows.append({**about, "arm": f"{about['arm']}, reads switched off", **measure(model, ids, edges, together)})
    return rows
