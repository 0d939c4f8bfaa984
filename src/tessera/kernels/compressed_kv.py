"""The quantised keys and values of a tier, in pages, in the form that kernels read."""

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
    """The interface of codecs that kernels use."""

    spec: str

    def kernel_format(self, dim: int) -> Format | None:
        """Return the format of vectors of `dim` numbers; None if there are no kernels for them."""

    def decode_reference(self, packed: Any) -> Tensor:
        """Decode packed vectors in PyTorch, in float32: the definition."""

    def summary(self, pages: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Summarise the keys of each block of pages without decoding them, if the codec can."""


class Coded(Protocol):
    """The interface of coded keys or values, implemented by `tessera.codecs.Packed`."""

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
    """The interface of factors of key channels before encoding, implemented by `KeyStats`."""

    @property
    def sizes(self) -> Tensor:
        """A byte for each channel: (batch, kv_heads, head_dim) uint8."""

    @property
    def table(self) -> Tensor:
        """The inverse factor for each byte value: (256,) float32 on the CPU."""

    @property
    def narrowing(self) -> Tensor:
        """The inverse factor of each channel: (batch, kv_heads, head_dim) float32."""


class CompressedKV:
    """Quantised keys and values of a layer, (batch, kv_heads, tokens, head_dim) in all. Immutable.

    Args:
        pages: at least one pair of keys and values of one layer, encoded with the roles "key" and "value", of equal shapes;
            keys and values may have different codecs. Only the number of tokens may differ between pages.
        before: earlier pages, whose derived data are reused where the first pages are the same objects.
        stats: its `narrowing` multiplies the channels of decoded keys or, equivalently, of the queries that read them; None:
            there are no factors.

    Attributes:
        pages: as given.
        shape: (batch, kv_heads, tokens, head_dim).
        memo: data that backends derive from the pages and keep as long as they exist.
    """

    def __init__(
        self, pages: Sequence[tuple[Coded, Coded]], before: CompressedKV | None = None, stats: Widened | None = None
    ) -> None:
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
        # As below: addresses are meaningless elsewhere, and here nothing would keep their tensors alive.
        return CompressedKV, (self.pages, None, self.stats)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedKV:
        # Data of backends, such as addresses, belong to these pages and not to copies.
        return CompressedKV(deepcopy(self.pages, memo), stats=deepcopy(self.stats, memo))

    def notes(self, name: str, make: Callable[[Coded, Coded], T]) -> list[T]:
        """Return data that a backend derives from each page, by name: computed once per page, also when pages are added."""
        notes = self._notes.setdefault(name, [])
        notes += [make(keys, values) for keys, values in self.pages[len(notes) :]]
        return notes

    @property
    def tokens(self) -> int:
        """Number of tokens held."""
        return self.starts[-1]

    def form(self) -> tuple[Format | None, Format | None]:
        """The formats of keys and of values; None where there is no kernel for a codec."""
        keys, values = self.codecs
        form = keys.kernel_format(self.shape[3])
        return form, form if values is keys else values.kernel_format(self.shape[3])

    @property
    def codecs(self) -> tuple[KernelCodec, KernelCodec]:
        """The codecs of keys and of values."""
        keys, values = self.pages[0]
        return keys.codec, values.codec

    def lacking(self, readable: Callable[[Format], bool] = lambda form: True) -> str | None:
        """Return the spec of the first codec without a kernel format, or without one that is readable; None if both have it."""
        formats = zip(self.codecs, self.form(), strict=True)
        return next((codec.spec for codec, form in formats if form is None or not readable(form)), None)

    def check(self, q: Tensor, params: AttendParams) -> tuple[Format, Format]:
        """Return `form`, after checking that queries (batch, q_heads, q_tokens, head_dim) and a mask fit.

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
        """Decode keys and values of tokens [start, stop)."""
        keys, values = self.decode_coded(start, stop)
        if self.stats is not None:
            most = min(torch.finfo(keys.dtype).max, torch.finfo(torch.float32).max)
            keys = (keys * self.stats.narrowing.unsqueeze(2)).clamp(-most, most).to(keys.dtype)
        return keys, values

    def narrowed(self, q: Tensor) -> Tensor:
        """Apply the inverse factors of key channels to queries (batch, q_heads, q_tokens, head_dim) instead of to keys."""
        if self.stats is None:
            return q
        batch, heads, tokens, dim = q.shape
        grouped = q.reshape(batch, self.shape[1], -1, dim)
        return (grouped * self.stats.narrowing.unsqueeze(2)).view(batch, heads, tokens, dim)

    def decode_coded(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Decode without applying the inverse factors of key channels."""
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
    """Decode packed vectors to (batch, heads, tokens, head_dim) float32 by the definition of their codec."""
    return packed.codec.decode_reference(packed)


def _same(pages: Sequence[tuple[Coded, Coded]], others: Sequence[tuple[Coded, Coded]]) -> int:
    """Count how many of the first pages are identical objects."""
    pairs = zip(pages, others, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a[0] is not b[0] or a[1] is not b[1]), min(len(pages), len(others)))


def strided(mask: Tensor | None) -> tuple[Tensor | None, tuple[int, int, int]]:
    """Return a bool mask with contiguous keys, and its strides over batch, heads and queries, 0 where it is shared."""
    if mask is None:
        return None, (0, 0, 0)
    if mask.dtype != torch.bool or (mask.shape[-1] > 1 and mask.stride(-1) != 1):
        mask = mask.bool().contiguous()
    batch, heads, queries = (0 if mask.shape[axis] == 1 else mask.stride(axis) for axis in range(3))
    return mask, (batch, heads, queries)
