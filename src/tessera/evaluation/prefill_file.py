"""Files of prefilled caches: a cache with the identity of the model and of the text that filled it."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from tessera.cache import Cache
from tessera.evaluation.identity import Identity
from tessera.evaluation.loading import Source, encode
from tessera.files import atomic_path, brief, open_tensors, read_json
from tessera.sealed import OPEN, SEAL, check_seal, seal

#: Tokens of a call. Whole pages, so that the bytes are those of a text that is read in one call.
CHUNK = 2048
#: The key of the file's kind in its header.
_NAME, _FORMAT = "tessera_prefill", 1
_WHAT = "is no file that 'tessera prefill' wrote"


@dataclass(frozen=True)
class Prefilled:
    """The description of the cache in a file.

    Attributes:
        spec: specification of the cache.
        tokens: that were read.
        text: SHA-256 of these tokens, as int64.
        model: that read them.
    """

    spec: str
    tokens: int
    text: str
    model: Identity


@torch.inference_mode()
def prefill(
    source: Source,
    text: str,
    spec: str,
    *,
    stats: str | os.PathLike[str] | None = None,
    chunk: int = CHUNK,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Cache, Prefilled]:
    """Let a model read a text into a new cache.

    Later chunks read the earlier ones from the cache, in the form that the spec gives them, as generation does.

    Args:
        source: the model and its tokenizer.
        text: to be read, with whatever the tokenizer puts in front of one.
        spec: specification of the cache.
        stats: file of key statistics; None: the text's own.
        chunk: tokens of a call.
        progress: called with the tokens that are read and those there are.

    Raises:
        ValueError: for a text without tokens or longer than the model's context, or a spec that it cannot have.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    ids = encode(source.tokenizer, text)[None].to(source.model.device)
    count = ids.shape[1]
    if not count:
        raise ValueError("the text has no tokens")
    if source.context is not None and count > source.context:
        raise ValueError(f"the text has {count:,} tokens, and the model was made for {source.context:,}")
    cache = Cache(spec, source.model, stats=stats)
    # Logits of every token would take more memory than the cache.
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(source.model.forward).parameters else {}
    for part in ids.split(chunk, dim=1):
        source.model(input_ids=part, past_key_values=cache, use_cache=True, **few)
        if progress is not None:
            progress(cache.get_seq_length(), count)
    return cache, Prefilled(str(cache.spec), count, text_hash(ids), Identity.of(source.model, source.name))


def text_hash(ids: Tensor) -> str:
    """SHA-256 of tokens. ids: any shape, int64."""
    return hashlib.sha256(ids.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def save_prefilled(cache: Cache, about: Prefilled, path: str | os.PathLike[str]) -> None:
    """Write a cache, what it is of, and a seal over both; `path` is replaced only when the whole file is there."""
    header = json.dumps({"format": _FORMAT, **asdict(about)})
    with atomic_path(path) as temporary:
        cache.save(temporary, notes={_NAME: header, SEAL: OPEN})
        seal(temporary)


def read_prefilled(path: str | os.PathLike[str]) -> Prefilled:
    """Read a file's description after checking its seal.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is something else, or was cut short or altered.
    """
    check_seal(path, _WHAT)
    with open_tensors(path, _WHAT) as file:
        said = file.metadata.get(_NAME)
    try:
        found = read_json(said or "")
        if not isinstance(found, dict) or found.pop("format", None) != _FORMAT:
            raise ValueError(f"this version reads format {_FORMAT}")
        if found.keys() != {"spec", "tokens", "text", "model"} or not isinstance(found["tokens"], int):
            raise ValueError("its header has other fields")
        return Prefilled(**{**found, "model": Identity.read(found["model"])})
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} {_WHAT}: {brief(error)}") from None


def load_prefilled(path: str | os.PathLike[str], source: Source, about: Prefilled | None = None) -> tuple[Cache, Prefilled]:
    """Load the cache in a file, for the model that made it.

    Args:
        path: path of the file.
        source: the model.
        about: a result of `read_prefilled` for the file, which is then not hashed again.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is something else, was cut short or altered, or is of another model, saying what differs.
    """
    about = read_prefilled(path) if about is None else about
    why = about.model.difference(Identity.of(source.model, source.name))
    if why is not None:
        raise ValueError(
            f"{os.fspath(path)} was made with the model {about.model.name!r} ({about.model.kind}), and {source.name!r} "
            f"cannot go on with it: {why}"
        )
    cache = Cache.load(path, source.model)
    if str(cache.spec) != about.spec or cache.get_seq_length() != about.tokens:
        raise ValueError(f"{os.fspath(path)} says {about.tokens} tokens in {about.spec!r} and holds {cache!r}")
    return cache, about
