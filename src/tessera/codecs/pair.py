"""``(k=q8_0,v=hqmq:3)``: a codec for keys and another for values. ``hqmq:k4.5v3.5`` is short for two of hqmq's.

`Packed` keys or values of a pair refer to the codec of their role, and are read without the pair.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from tessera.codecs.base import Codec, Layout, Packed, Role
from tessera.codecs.registry import get, register

#: An example of a pair, for errors.
EXAMPLE = "(k=q8_0,v=hqmq:3)"
#: Specs of two codecs that are written as one if their endings are equal: bits, and the ending.
_SHORT = re.compile(r"hqmq:(\d+(?:\.\d+)?)((?:_norot)?(?:_nocentre)?(?:_nostats)?)")


class Pair(Codec):
    """Keys by one codec, values by another.

    True bits per element: the mean of the two codecs' bits, since there are as many keys as values.

    Args:
        key: codec of the keys.
        value: codec of the values, another one; see `pair` where they may be the same.

    Raises:
        ValueError: if they are the same, or one is a pair itself.
    """

    def __init__(self, key: Codec, value: Codec) -> None:
        for role, codec in (("keys", key), ("values", value)):
            if isinstance(codec, Pair):
                raise ValueError(f"{codec.spec} is two codecs; {role} need one, as in {EXAMPLE!r}")
        if key == value:
            raise ValueError(f"keys and values have the same codec: write {key.spec!r}")
        self.key, self.value = key, value
        self.group = math.lcm(key.group, value.group)
        self.fields: Mapping[str, Layout] = {**value.fields, **key.fields}
        self.weighs, self.by_call = key.weighs, key.by_call or value.by_call
        self.spec = _spec(key, value)

    def side(self, role: Role) -> Codec:
        """See `Codec`."""
        return self.key if role == "key" else self.value

    def decode_reference(self, packed: Packed) -> Tensor:
        """See `Codec`."""
        return self.side(packed.role).decode_reference(packed)

    def kept(self, heads: int, dim: int, role: Role) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See `Codec`."""
        return self.side(role).kept(heads, dim, role)

    def check(self, packed: Packed) -> None:
        """See `Codec`."""
        self.side(packed.role).check(packed)

    def _encode(self, x: Tensor, role: Role, layer: int) -> Mapping[str, Tensor]:
        return self.side(role)._encode(x, role, layer)

    def _encode_weighed(self, x: Tensor, role: Role, layer: int, weights: Tensor) -> Mapping[str, Tensor]:
        return self.side(role)._encode_weighed(x, role, layer, weights)


def pair(key: Codec, value: Codec) -> Codec:
    """Return the codec with `key` for keys and `value` for values: `key` itself where they are the same."""
    return key if key == value and not isinstance(key, Pair) else Pair(key, value)


def _spec(key: Codec, value: Codec) -> str:
    first, second = (_SHORT.fullmatch(codec.spec) for codec in (key, value))
    if first and second and first[2] == second[2]:
        return f"hqmq:k{first[1]}v{second[1]}{first[2]}"
    return f"(k={key.spec},v={value.spec})"


@register("(", (EXAMPLE,))
def _parse(argument: str) -> Codec:
    """Parse the text after the opening bracket: ``k=q8_0,v=hqmq:3)``."""
    if not argument.endswith(")"):
        raise ValueError(f"a codec for keys and one for values stand between brackets, got {'(' + argument!r}")
    words: dict[str, str] = {}
    for word in argument[:-1].split(","):
        name, equals, spec = (part.strip() for part in word.partition("="))
        if name not in ("k", "v") or not equals:
            raise ValueError(f"in brackets there are 'k=' with the codec of keys and 'v=' with that of values, got {word!r}")
        if name in words:
            raise ValueError(f"{word.strip()!r} is a second codec for {'keys' if name == 'k' else 'values'}")
        words[name] = spec
    for name, what in (("k", "keys"), ("v", "values")):
        if name not in words:
            raise ValueError(f"there is no codec for {what}: {name + '='!r} is missing")
    return pair(get(words["k"]), get(words["v"]))
