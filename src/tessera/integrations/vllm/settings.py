"""The settings of an engine: one specification for all layers and requests.

It comes from the environment variable TESSERA_SPEC, or from vLLM's `--additional-config '{"tessera": "sink:4 + hqmq:4"}'`,
which takes precedence. A file of statistics of keys, as `tessera stats` writes it, is named by TESSERA_STATS, or by
"tessera_stats" beside "tessera". The grammar is that of `tessera.Cache`, of which an engine takes three words: `sink`, a codec,
and `recent`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from tessera import codecs
from tessera.codecs import Codec
from tessera.kernels.paged import GROUP
from tessera.tiers.spec import parse

#: The environment variable, and the key in `additional_config`.
VARIABLE, KEY = "TESSERA_SPEC", "tessera"
#: The same two names for the file of statistics.
STATS_VARIABLE, STATS_KEY = "TESSERA_STATS", "tessera_stats"


@dataclass(frozen=True)
class Settings:
    """The codec and options of pages.

    Attributes:
        text: the specification as it was given.
        codec: codec of pages.
        sink: first tokens of each request that stay exact, in its first block.
        stats: path of the statistics of keys, for all requests; None: keys are coded as they come.
    """

    text: str
    codec: Codec
    sink: int
    stats: str | None = None


def read(text: str, stats: str | None = None) -> Settings:
    """Read a specification for an engine.

    `recent` may be left out, and may be up to `GROUP`: an engine keeps exactly the group of `GROUP` tokens that a request is
    filling, and nothing else of what is new, so that a request that finds its beginning in the pool computes the same as one
    that does not.

    Raises:
        ValueError: naming the word that an engine does not support.
    """
    if text.strip().startswith("{"):
        raise ValueError(f"in vLLM all layers have one specification, as in 'sink:4 + hqmq:4'; got {text!r}")
    spec = parse(text)
    if spec.codec is None:
        raise ValueError(f"in vLLM a specification needs a codec, as in 'sink:4 + hqmq:4'; got {text!r}")
    if spec.window is not None or spec.tensor_cache or any(limit is not None for _, limit in spec.codecs):
        raise ValueError(
            f"in vLLM nothing is dropped: write 'sink:N', one codec without a limit and 'recent:{GROUP}'; got {text!r}"
        )
    if spec.recent > GROUP:
        raise ValueError(
            f"in vLLM only the group of {GROUP} tokens that is being filled is exact: at most 'recent:{GROUP}', got {text!r}"
        )
    if spec.sink >= GROUP:
        raise ValueError(f"in vLLM 'sink:{GROUP - 1}' is the most, got {text!r}")
    codec = codecs.get(spec.codec)
    if stats is not None and not codec.weighs:
        raise ValueError(f"{STATS_VARIABLE} is for codecs that see keys as queries do, such as 'hqmq:4'; got {text!r}")
    return Settings(text, codec, spec.sink, stats)


def configured(config: Any = None) -> Settings | None:
    """Return the settings of an engine, or None where nothing is set.

    Args:
        config: the engine's `VllmConfig`; None: the current one.
    """
    if config is None:
        from vllm.config import get_current_vllm_config_or_none

        config = get_current_vllm_config_or_none()
    given = getattr(config, "additional_config", None)
    given = given if isinstance(given, dict) else {}
    text = given.get(KEY) or os.environ.get(VARIABLE)
    stats = given.get(STATS_KEY) or os.environ.get(STATS_VARIABLE)
    return read(text, stats or None) if text else None


def required(config: Any) -> Settings:
    """Return the settings of an engine that has Tessera's backend.

    Raises:
        ValueError: if nothing is set.
    """
    settings = configured(config)
    if settings is None:
        raise ValueError(f"Tessera's backend needs a specification: set {VARIABLE}, as in {VARIABLE}='sink:4 + hqmq:4'")
    return settings
