"""Access to the streams of a causal model's Tensor Memory, which are kept on the layers of the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tessera.cache_layers.cache_layer import TesseraLayer
from tessera.cache_layers.group import RECORDED
from tessera.cache_layers.layer_states import state_of, stateful
from tessera.cache_layers.stream import BACK, TENSOR_MEMORY, CropGuard, Run, Stream
from tessera.devices import upload
from tessera.tensor_memory.tensor_memory_config import TensorMemoryConfig


def known_stream(cache: Any, index: int, owner: str) -> Stream | None:
    """Return the stream of the memory named `owner` at a cache's layer, or None."""
    layers = () if cache is None else cache.layers
    found = state_of(layers[index], TENSOR_MEMORY) if index < len(layers) else None
    return found if isinstance(found, Stream) and found.owner == owner else None


def stream_of(cache: Any, index: int, batch: int, past: int, owner: str, config: TensorMemoryConfig) -> Stream:
    """Return the stream to continue at a layer that holds the keys and values of `past` tokens.

    Args:
        cache: tessera's or transformers'.
        index: index of the layer.
        batch: number of rows of the call.
        past: tokens in the cache before these.
        owner, config: the memory's, see `Stream`.

    Raises:
        ValueError: if the memory has not read the tokens in the cache, or the cache has another number of rows.
    """
    found = known_stream(cache, index, owner)
    if past == 0:
        # The cache is new, or has been reset.
        if found is None:
            found = Stream(batch, owner, config)
            stateful(cache.layers[index]).put(TENSOR_MEMORY, found)
            if index and not isinstance(cache.layers[0], TesseraLayer) and known_stream(cache, 0, owner) is None:
                stateful(cache.layers[0]).put(TENSOR_MEMORY, CropGuard(found))
        else:
            found.begin(batch)
    seen = 0 if found is None else found.seen
    if found is None or seen != past:
        raise ValueError(
            f"this cache holds {past} tokens, of which the Tensor Memory has read {seen}: it was filled without the "
            "memory or loaded from a file of such a one, or a call stopped half-way; begin with a new cache, or call "
            "cache.reset()"
        )
    if found.batch != batch:
        raise ValueError(f"this cache is of {found.batch} sequences, and {batch} were given")
    return found


def tokens_back(cache: Any, stream: Stream) -> int:
    """Number of tokens by which a stream must be croppable. None in gradient mode, because a crop would lose gradients."""
    if torch.is_grad_enabled():
        return 0
    # Only some kinds of layers know that the past is recorded.
    recording = stream.recording or any(getattr(layer, "record_past", False) for layer in cache.layers)
    return RECORDED if recording else BACK


def advance_documents(run: Run, x: Tensor, real: Tensor | None, begins: Tensor) -> Tensor:
    """Run the memory over rows of several documents, each with a state of its own.

    Args:
        run: see `Stream.advance`.
        x: (batch, tokens, dim).
        real: (batch, tokens) bool on the CPU, False for padding; None: there is none.
        begins: (batch, tokens) bool on the CPU, True where a document begins behind another.

    Returns:
        (batch, tokens, dim), zero at padding.
    """
    batch, tokens, _ = x.shape
    places = torch.arange(batch * tokens)
    if real is not None:
        places = places[real.flatten()]
    number = begins.cumsum(1) + torch.arange(batch)[:, None] * (tokens + 1)
    _, lengths = number.flatten()[places].unique_consecutive(return_counts=True)
    documents = places.split(lengths.tolist())
    flat, out = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
    # Documents of similar length run as one batch; the padding, less than the documents, comes last, where no token sees it.
    for size in sorted({len(document).bit_length() for document in documents}):
        members = [document for document in documents if len(document).bit_length() == size]
        at = pad_sequence(members, batch_first=True)
        own = torch.arange(at.shape[1]) < torch.tensor([len(document) for document in members])[:, None]
        added, _ = run(flat[upload(at, x.device)], None)
        out = out.index_put((upload(at[own], x.device),), added[own.to(x.device)])
    return out.view_as(x)
