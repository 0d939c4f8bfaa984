"""Codecs: x -> packed bytes -> x̂. One file per codec, found by name with `get`."""

from tessera.codecs.base import Codec, Packed, Role
from tessera.codecs.hqmq import HQMQ
from tessera.codecs.hqmq_joint import JointHQMQ
from tessera.codecs.registry import examples, get, names

__all__ = ["HQMQ", "Codec", "JointHQMQ", "Packed", "Role", "examples", "get", "names"]
