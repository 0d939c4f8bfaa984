"""A packed tier as kernels read it: pages of keys and values, one behind the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import accumulate
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from tessera.kernels.joint import JointFormat
from tessera.kernels.params import AttendParams
from tessera.kernels.precision import join
from tessera.kernels.products import ProductFormat
from tessera.kernels.scalars import ScalarFormat

T = TypeVar("T")
Format: TypeAlias = JointFormat | ProductFormat | ScalarFormat


class KernelCodec(Protocol):
    """What kernels ask of a codec."""

    spec: str

    def kernel_format(self, dim: int) -> Format | None:
        """What they must know of vectors of `dim` numbers; None if there are no kernels for them."""

    def decode_reference(self, packed: Any) -> Tensor:
        """What packed vectors stand for, in PyTorch: the definition, in float32."""

    def summary(self, pages: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """What is known of the keys of each block of pages without decoding them, if the codec keeps it."""


class Coded(Protocol):
    """Coded keys or values as kernels read them; `tessera.codecs.Packed` is what they are."""

    @property
    def codec(self) -> KernelCodec: ...  # noqa: D102
    @property
    def tensors(self) -> Mapping[str, Tensor]: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int, int, int, int]: ...  # noqa: D102
    @property
    def role(self) -> str: ...  # noqa: D102
    @property
    def layer(self) -> int: ...  # noqa: D102
    @property
    def offset(self) -> int: ...  # noqa: D102
    @property
    def tokens(self) -> int: ...  # noqa: D102
    @property
    def device(self) -> torch.device: ...  # noqa: D102
    def slice(self, start: int, stop: int) -> Coded: ...  # noqa: D102
    def decode(self) -> Tensor: ...  # noqa: D102
    def describe(self) -> str: ...  # noqa: D102


class Widened(Protocol):
    """What says by how much channels of keys were multiplied before they were coded; `KeyStats` is what does."""

    @property
    def sizes(self) -> Tensor:
        """A byte for each channel: (batch, kv_heads, head_dim) uint8."""

    @property
    def table(self) -> Tensor:
        """One over what the channel was multiplied by, for each byte: (256,) float32 on the CPU."""

    @property
    def narrowing(self) -> Tensor:
        """The same for each channel: (batch, kv_heads, head_dim) float32."""


class Pages:
    """Packed keys and values, (batch, kv_heads, tokens, head_dim) in all. Immutable.

    Args:
        pages: at least one pair of keys and values of one layer, each encoded as what it is, of equal shapes; keys and values
            may have codecs of their own. Only tokens may differ from page to page.
        before: pages whose first ones may be the same objects; what is known of these is taken over.
        stats: by whose `narrowing` the channels of decoded keys are multiplied or, instead, those of the queries that read
            them; None: by nothing.

    Attributes:
        pages: as given.
        shape: (batch, kv_heads, tokens, head_dim).
        memo: what backends derive from the pages and want to keep as long as they live.
    """

    def __init__(self, pages: Sequence[tuple[Coded, Coded]], before: Pages | None = None, stats: Widened | None = None) -> None:
        if not pages:
            raise ValueError("there are no pages")
        self.pages = tuple(pages)
        same = 0 if before is None else _same(self.pages, before.pages)
        self._notes: dict[str, list[Any]] = {} if before is None else {k: v[:same] for k, v in before._notes.items()}
        for keys, values in self.pages[same:]:
            if keys.shape != values.shape:
                raise ValueError(f"keys {tuple(keys.shape)} and values {tuple(values.shape)} differ in shape")
            if keys.layer != values.layer:
                raise ValueError(f"a page of {values.describe()} beside one of {keys.describe()}")
            for packed, first, role in zip((keys, values), self.pages[0], ("key", "value"), strict=True):
                alike = (packed.shape[:2], packed.shape[3], packed.codec, packed.layer)
                if alike != (first.shape[:2], first.shape[3], first.codec, first.layer):
                    raise ValueError(f"a page of {packed.describe()} beside one of {first.describe()}")
                if packed.role != role:
                    raise ValueError(f"{packed.describe()}, are given as {role}s: encode them with the role {role!r}")
        size = self.pages[0][0].shape
        self.starts = (0, *accumulate(keys.tokens for keys, _ in self.pages))
        self.shape = (*size[:2], self.starts[-1], size[3])
        self.stats = stats
        self.memo: dict[Any, Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # As below: addresses mean nothing elsewhere, and here they would keep nobody's tensors alive.
        return Pages, (self.pages, None, self.stats)

    def __deepcopy__(self, memo: dict[int, Any]) -> Pages:
        # What backends keep, addresses among it, is of these pages and not of their copies.
        return Pages(deepcopy(self.pages, memo), stats=deepcopy(self.stats, memo))

    def notes(self, name: str, make: Callable[[Coded, Coded], T]) -> list[T]:
        """What a backend notes of each page, under a name of its own: made once a page, however many are added behind it."""
        notes = self._notes.setdefault(name, [])
        notes += [make(keys, values) for keys, values in self.pages[len(notes) :]]
        return notes

    @property
    def tokens(self) -> int:
        """Number of tokens held."""
        return self.starts[-1]

    def form(self) -> tuple[Format | None, Format | None]:
        """What kernels must know of how keys are coded and of how values are; None where they have none for it."""
        keys, values = self.codecs
        form = keys.kernel_format(self.shape[3])
        return form, form if values is keys else values.kernel_format(self.shape[3])

    @property
    def codecs(self) -> tuple[KernelCodec, KernelCodec]:
        """The codecs of keys and of values."""
        keys, values = self.pages[0]
        return keys.codec, values.codec

    def lacking(self, kind: type[Any] = object) -> str | None:
        """The spec of the first codec whose format is not known to kernels, or not of a kind; None if both are."""
        formats = zip(self.codecs, self.form(), strict=True)
        return next((codec.spec for codec, form in formats if form is None or not isinstance(form, kind)), None)

    def check(self, q: Tensor, params: AttendParams) -> tuple[Format, Format]:
        """`form`, for queries (batch, q_heads, q_tokens, head_dim) and a mask that fit.

        Raises:
            ValueError: if they do not, or there is no kernel for a codec.
        """
        batch, heads, queries, dim = q.shape
        rows, kv_heads, count, own = self.shape
        if batch != rows or heads % kv_heads or dim != own:
            raise ValueError(f"queries {tuple(q.shape)} do not fit keys {self.shape}")
        params.check(queries, count)
        keys, values = self.form()
        if keys is None or values is None:
            raise ValueError(f"there is no kernel for {self.lacking()}")
        return keys, values

    def decode(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens [start, stop)."""
        keys, values = self.decode_coded(start, stop)
        if self.stats is not None:
            most = min(torch.finfo(keys.dtype).max, torch.finfo(torch.float32).max)
            keys = (keys * self.stats.narrowing.unsqueeze(2)).clamp(-most, most).to(keys.dtype)
        return keys, values

    def narrowed(self, q: Tensor) -> Tensor:
        """Queries (batch, q_heads, q_tokens, head_dim) as they read the keys before their channels are multiplied."""
        if self.stats is None:
            return q
        batch, heads, tokens, dim = q.shape
        grouped = q.reshape(batch, self.shape[1], -1, dim)
        return (grouped * self.stats.narrowing.unsqueeze(2)).view(batch, heads, tokens, dim)

    def decode_coded(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """`decode` before the channels of the keys are multiplied."""
        stop = self.tokens if stop is None else stop
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for at, (k, v) in zip(self.starts, self.pages, strict=False):
            a, b = max(start - at, 0), min(stop - at, k.tokens)
            if a < b or (not keys and at + k.tokens == self.tokens):
                keys.append(k.slice(a, b).decode())
                values.append(v.slice(a, b).decode())
        return (keys[0], values[0]) if len(keys) == 1 else (join(keys, 2), join(values, 2))


def decode_reference(packed: Coded) -> Tensor:
    """What packed vectors stand for, (batch, heads, tokens, head_dim) float32, by the definition of their codec."""
    return packed.codec.decode_reference(packed)


def _same(pages: Sequence[tuple[Coded, Coded]], others: Sequence[tuple[Coded, Coded]]) -> int:
    """How many of the first pages are the very objects of the others."""
    pairs = zip(pages, others, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a[0] is not b[0] or a[1] is not b[1]), min(len(pages), len(others)))


def strided(mask: Tensor | None) -> tuple[Tensor | None, tuple[int, int, int]]:
    """A mask whose keys lie next to each other, bool, and its strides over batch, heads and queries, 0 where it is shared."""
    if mask is None:
        return None, (0, 0, 0)
    if mask.dtype != torch.bool or (mask.shape[-1] > 1 and mask.stride(-1) != 1):
        mask = mask.bool().contiguous()
    batch, heads, queries = (0 if mask.shape[axis] == 1 else mask.stride(axis) for axis in range(3))
    return mask, (batch, heads, queries)
