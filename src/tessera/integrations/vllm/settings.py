"""What is set: one specification for all layers and requests.

It comes from the environment variable TESSERA_SPEC, or from vLLM's `--additional-config '{"tessera": "sink:4 + hqmq:4"}'`,
which wins. The words are those of `tessera.Cache`, of which an engine takes three: `sink`, a codec, and `recent`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from tessera import codecs
from tessera.cache.spec import parse
from tessera.codecs import Codec
from tessera.kernels.paged import GROUP

#: The environment variable, and the key in `additional_config`.
VARIABLE, KEY = "TESSERA_SPEC", "tessera"


@dataclass(frozen=True)
class Settings:
    """What pages are made of.

    Attributes:
        text: the specification as it was given.
        codec: of pages.
        sink: first tokens of each request that stay exact, in its first block.
    """

    text: str
    codec: Codec
    sink: int


def read(text: str) -> Settings:
    """Read a specification for an engine.

    `recent` may be left out, and may be up to `GROUP`: an engine keeps exactly the group of `GROUP` tokens that a request is
    filling, and nothing else of what is new, so that a request that finds its beginning in the pool computes the same as one
    that does not.

    Raises:
        ValueError: naming the word that an engine cannot follow.
    """
    spec = parse(text)
    if spec.codec is None:
        raise ValueError(f"in vLLM a specification needs a codec, as in 'sink:4 + hqmq:4'; got {text!r}")
    if spec.window is not None or spec.associative or spec.codec_limit is not None:
        raise ValueError(
            f"in vLLM nothing is dropped: write 'sink:N', a codec without a limit and 'recent:{GROUP}'; got {text!r}"
        )
    if spec.recent > GROUP:
        raise ValueError(
            f"in vLLM only the group of {GROUP} tokens that is being filled is exact: at most 'recent:{GROUP}', got {text!r}"
        )
    if spec.sink >= GROUP:
        raise ValueError(f"in vLLM 'sink:{GROUP - 1}' is the most, got {text!r}")
    return Settings(text, codecs.get(spec.codec), spec.sink)


def configured(config: Any = None) -> Settings | None:
    """The settings of an engine, or None where nothing is set.

    Args:
        config: the engine's `VllmConfig`; None: the one that is current.
    """
    if config is None:
        from vllm.config import get_current_vllm_config_or_none

        config = get_current_vllm_config_or_none()
    given = getattr(config, "additional_config", None)
    text = given.get(KEY) if isinstance(given, dict) else None
    text = text or os.environ.get(VARIABLE)
    return read(text) if text else None


def required(config: Any) -> Settings:
    """The settings of an engine that has Tessera's backend.

    Raises:
        ValueError: if nothing is set.
    """
    settings = configured(config)
    if settings is None:
        raise ValueError(f"Tessera's backend needs a specification: set {VARIABLE}, as in {VARIABLE}='sink:4 + hqmq:4'")
    return settings
