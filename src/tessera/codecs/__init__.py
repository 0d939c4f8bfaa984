"""Codecs: x -> packed bytes -> x̂. One file per codec, found by name with `get`."""

from tessera.codecs.base import Codec, Packed, Role
from tessera.codecs.registry import examples, get, names

__all__ = ["Codec", "Packed", "Role", "examples", "get", "names"]
