"""The method of a specification, and its name in tables and pictures."""

from __future__ import annotations

import re

from tessera.tiers.per_layer import PerLayer, parse

#: (pattern of a codec's spec, name of its method), the first that fits.
_METHODS = (
    (r"hqmq:k?\d.*", "HQMQ, Tessera's"),
    (r"hqmq:o.*", "HQMQ, optimised directions"),
    (r"hqmq:.*", "HQMQ, the paper's"),
    (r"scalar.*", "Hadamard + Lloyd–Max"),
    (r"q\d_\d.*", "llama.cpp blocks"),
    (r"int.*", "int, round to nearest"),
    (r"kivi.*", "KIVI"),
    (r"fp8.*", "fp8"),
    (r"\(.*", "keys and values apart"),
)


def method(spec: str) -> str:
    """Return the name of a specification's method in pictures."""
    parsed = parse(spec)
    if isinstance(parsed, PerLayer):
        return "differs by layer"
    if parsed.dense:
        return "exact"
    if parsed.codec is None:
        return "window"
    for pattern, name in _METHODS:
        if re.fullmatch(pattern, parsed.codec):
            return name
    return parsed.codec.partition(":")[0]


def short(spec: str) -> str:
    """Return the word that distinguishes a specification from others of its method."""
    parsed = parse(spec)
    if isinstance(parsed, PerLayer):
        return " ".join(dict.fromkeys(codec for codec, _ in parsed.codecs))
    if parsed.codec is not None:
        return parsed.codec
    return "dense" if parsed.dense else f"window:{parsed.window}"
