"""One warning where a cache compresses a first token that draws much of the model's attention."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor

from tessera.attention.first_token import SINK, first_key_weight
from tessera.attention.plain import Softmax
from tessera.cache.lane import Turn
from tessera.cache.layer import TesseraLayer

#: Fewer new tokens than this say too little: of a few keys the first has much weight anyway.
ENOUGH = 64


def warn_if_sinks_are_missing(
    layer: TesseraLayer, query: Tensor, turns: Sequence[Turn], scale: float, softmax: Softmax
) -> None:
    """Look, in the first call of a cache without sinks, at how much attention the first token draws; warn once if it is much.

    Only there is it known for little more than nothing: the call begins the sequence, and its keys are exact still. It must
    have more than `ENOUGH` tokens. Looked at are the layers of the second half without a sliding window, until one has a sink.
    After the last layer of that call nothing is looked at any more.

    Args:
        layer: of the cache, whose `link.sinks_known` says whether there is nothing left to find out.
        query: (batch, q_heads, tokens, head_dim).
        turns: of the call, as `TesseraLayer.open` gave them.
        scale: of the scores.
        softmax: how scores become weights.
    """
    link, policy = layer.link, layer.policy
    link.sinks_known = layer.index == link.last
    if layer.index < link.last // 2 or layer.sliding is not None or not policy.codecs or policy.sink:
        return
    if len(turns) != 1 or turns[0].first or turns[0].pending is None or turns[0].tokens <= ENOUGH:
        return
    (turn,) = turns
    assert turn.pending is not None
    rows = query if len(turn.lane.rows) == query.shape[0] else query[turn.lane.rows]
    weight = first_key_weight(turn.queries.of(rows, 0, 2), turn.pending[0], scale, softmax.softcap, softmax.s_aux)
    if weight > SINK:
        link.sinks_known = True
        warnings.warn(
            f"the first token draws {weight:.0%} of the attention of layer {layer.index}, and this cache compresses it, as its "
            "spec has no sinks: what the model says will differ more than it need. Add 'sink:4' to the spec.",
            stacklevel=2,
        )
