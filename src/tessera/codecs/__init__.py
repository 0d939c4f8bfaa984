"""Codecs: x -> packed bytes -> x̂. One file per codec, found by name with `get`."""

# HQMQ before the baselines: lists of codecs, in errors and tables, are in the order of registration.
from tessera.codecs.base import Codec, Packed, Role
from tessera.codecs.hqmq import HQMQ
from tessera.codecs.hqmq_joint import JointHQMQ

# isort: split
from tessera.codecs.blocks import Blocks
from tessera.codecs.channel_stats import KeyStats, load_stats, save_stats
from tessera.codecs.fp8 import FP8
from tessera.codecs.integer import Int, Kivi
from tessera.codecs.registry import examples, get, names
from tessera.codecs.scalar import Scalar

# isort: split
from tessera.codecs.pair import Pair

__all__ = [
    "FP8",
    "HQMQ",
    "Blocks",
    "Codec",
    "Int",
    "JointHQMQ",
    "KeyStats",
    "Kivi",
    "Packed",
    "Pair",
    "Role",
    "Scalar",
    "examples",
    "get",
    "load_stats",
    "names",
    "save_stats",
]
