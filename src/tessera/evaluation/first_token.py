"""Whether a model's first token is an attention sink, and which specifications are without sinks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tessera.attention import enable
from tessera.attention.first_token_weight import SINK, first_key_weight
from tessera.attention.observed import Call, observed
from tessera.cache.model_config import read_config
from tessera.tiers.per_layer import parse

#: Maximum number of tokens of the text that are read.
READ = 512
#: Number of sinks that are added to a specification without sinks.
SINKS = 4

__all__ = ["SINK", "first_token_weight", "lacks_sinks", "with_sinks"]


def first_token_weight(model: Any, ids: Tensor) -> float:
    """Return the largest mean weight, over layers, of a text's first token for its newest queries with exact attention.

    The mean is over the heads of a layer; layers with a sliding window are left out, for they lose the first token anyway.

    Args:
        model: without an attached memory; its attention is routed through Tessera.
        ids: (1, tokens), of which the first `READ` are read.

    Returns:
        from 0 to 1; 0.0 for a model whose layers all have sliding windows.
    """
    layers = read_config(model.config)[1]
    found = [0.0]

    def see(call: Call) -> None:
        if layers[call.layer][1] is None:
            softcap, s_aux = call.options.get("softcap"), call.options.get("s_aux")
            found.append(float(first_key_weight(call.query, call.key, call.scale, softcap, s_aux)))

    enable(model)
    with observed(see), torch.inference_mode():
        model(input_ids=ids[:, :READ], use_cache=False)
    return max(found)


def lacks_sinks(spec: str) -> bool:
    """Whether a specification compresses the first token."""
    parsed = parse(spec)
    return parsed.codec is not None and parsed.sink == 0


def with_sinks(spec: str, plan: Sequence[str] = ()) -> str:
    """Add `SINKS` sinks to a specification; in the spelling of `plan` if the result is in it."""
    wanted = parse(spec).with_sinks(SINKS)
    return next((other for other in plan if parse(other) == wanted), str(wanted))
