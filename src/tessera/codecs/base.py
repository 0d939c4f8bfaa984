"""The interface of codecs (`Codec`) and of encoded keys or values (`Packed`)."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import pairwise
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from tessera.codecs.ragged import Fields, pending
from tessera.devices import upload
from tessera.files import WHOLE, atomic_path, brief, open_tensors
from tessera.kernels import dispatch
from tessera.kernels.bits import unpack_bits
from tessera.kernels.compressed_kv import Format
from tessera.kernels.precision import join, no_autocast
from tessera.readback import HostCopy

Role = Literal["key", "value"]

#: The layout of a kept tensor. "token": (batch, kv_heads, tokens, ...). "group": (batch, kv_heads, groups, ...), a group
#: being `Codec.group` tokens that were encoded together. "ragged": (n, ...), a row for each set bit of the token field
#: "flags" (a bitmap of 8 per byte), ordered by token, batch, head, bit.
Layout = Literal["token", "group", "ragged"]

#: Larger magnitudes saturate before they are encoded: their squares would overflow, and no codec keeps a scale that large.
HUGE = 2.0**48
#: No model has more tokens, heads, numbers in a head, or layers.
MOST = 1 << 40
#: Number of tokens whose codes are checked together.
PART = 256
#: Dtypes that keys and values may have.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Packed:
    """Encoded keys or values: the packed tensors and the metadata to decode them. Immutable; views share memory.

    Attributes:
        codec: the codec that encoded this and can decode it.
        tensors: everything that is kept, by field name; `codec.fields` says how each is laid out.
        shape: (batch, kv_heads, tokens, head_dim) of what was encoded.
        dtype: dtype of what was encoded; `decode` gives it back.
        role: "key" or "value".
        layer: index of the layer in its model; codebooks drawn per layer depend on it.
        offset: number of tokens of the first group that were sliced off.
    """

    codec: Codec
    tensors: Mapping[str, Tensor]
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    role: Role = "value"
    layer: int = 0
    offset: int = 0

    @property
    def tokens(self) -> int:
        """Number of tokens held."""
        return self.shape[2]

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return next(iter(self.tensors.values())).device

    @property
    def nbytes(self) -> int:
        """Bytes of all kept tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def bits_per_element(self) -> float:
        """True bits: all kept bits over the number of encoded elements."""
        batch, heads, tokens, dim = self.shape
        return 8 * self.nbytes / max(1, batch * heads * tokens * dim)

    def decode(self) -> Tensor:
        """Decode to an approximation of what was encoded: (batch, kv_heads, tokens, head_dim) in `dtype`."""
        return self.codec.decode(self)

    def to(self, device: torch.device | str) -> Packed:
        """Return a copy on another device."""
        return replace(self, tensors={name: t.to(device) for name, t in self.tensors.items()})

    def compact(self) -> Packed:
        """Return a copy that owns its memory, so that the tensors it was sliced from can be freed."""
        fields = self.tensors
        if not pending(fields):
            return replace(self, tensors={name: t.clone() for name, t in fields.items()})
        ragged = [name for name in fields if self.codec.fields[name] == "ragged"]
        known = {name: fields[name].clone() for name in fields if name not in ragged}
        return replace(self, tensors=Fields(known, {name: partial(_copy_of, fields, name) for name in ragged}))

    def complete(self) -> Packed:
        """Make the fields of which the host did not know yet how long they are, and return this."""
        for _ in self.tensors.values():
            pass
        return self

    def slice(self, start: int, stop: int) -> Packed:
        """Tokens [start, stop), without copying."""
        batch, heads, tokens, dim = self.shape
        start = min(tokens, max(0, start))
        stop = max(start, min(tokens, stop))
        if (start, stop) == (0, tokens):
            return self
        group = self.codec.group
        first, last = (self.offset + start) // group, -(-(self.offset + stop) // group)
        if stop == start:
            last = first
        parts: dict[str, Tensor] = {}
        later: dict[str, Callable[[], Tensor]] = {}
        for name in self.tensors:
            layout = self.codec.fields[name]
            if layout == "token":
                parts[name] = self.tensors[name][:, :, start:stop]
            elif layout == "group":
                parts[name] = self.tensors[name][:, :, first:last]
            else:
                ends = HostCopy(torch.nn.functional.pad(_set_bits(self.tensors["flags"]).sum((0, 1, 3)).cumsum(0), (1, 0)))
                later[name] = partial(_part_of, self.tensors, name, ends, start, stop)
        offset = (self.offset + start) % group if stop > start else 0
        return replace(
            self, tensors=Fields(parts, later) if later else parts, shape=(batch, heads, stop - start, dim), offset=offset
        )

    def select(self, rows: Tensor) -> Packed:
        """Batch rows by index, in the order given; a row may be taken more than once. rows: (n,) int64."""
        rows = upload(rows, self.device)
        parts = {}
        for name, tensor in self.tensors.items():
            if self.codec.fields[name] == "ragged":
                # Row numbers of `tensor`, at the places of their bits, are selected like the bits.
                bits = _set_bits(self.tensors["flags"]).permute(2, 0, 1, 3)
                number = (bits.flatten().cumsum(0) - 1).view(bits.shape)[:, rows]
                parts[name] = tensor[number[bits[:, rows].bool()]]
            else:
                parts[name] = tensor[rows]
        return replace(self, tensors=parts, shape=(len(rows), *self.shape[1:]))

    @staticmethod
    def cat(parts: list[Packed]) -> Packed:
        """Join along the tokens. Each part but the last must end with a whole group, each but the first begin with one.

        Where dtypes differ, the result has the widest, so that decoding rounds nothing further.
        """
        first = parts[0]
        for left, right in pairwise(parts):
            same = (left.codec, left.shape[:2], left.shape[3], left.role, left.layer)
            if same != (right.codec, right.shape[:2], right.shape[3], right.role, right.layer):
                raise ValueError(f"cannot join {right.describe()} to {left.describe()}")
            if (left.offset + left.tokens) % left.codec.group or right.offset:
                raise ValueError(
                    f"{left.codec.spec} encodes {left.codec.group} tokens together, so parts can only be joined where a "
                    f"group ends; the left part ends {(left.offset + left.tokens) % left.codec.group} tokens into a "
                    f"group and the right one begins {right.offset} tokens into one"
                )
        tensors: dict[str, Tensor] = {}
        later: dict[str, Callable[[], Tensor]] = {}
        for name, layout in first.codec.fields.items():
            if name in first.tensors and layout == "ragged" and any(pending(p.tensors) for p in parts):
                later[name] = partial(_joined, [p.tensors for p in parts], name)
            elif name in first.tensors:
                tensors[name] = join([p.tensors[name] for p in parts], 0 if layout == "ragged" else 2)
        shape = (*first.shape[:2], sum(p.tokens for p in parts), first.shape[3])
        dtype = reduce(torch.promote_types, (p.dtype for p in parts))
        return replace(first, tensors=Fields(tensors, later) if later else tensors, shape=shape, dtype=dtype)

    def describe(self) -> str:
        """Describe this in one line for error messages."""
        return f"{self.role}s of layer {self.layer}, shape {tuple(self.shape)}, in {self.codec.spec}"

    def metadata(self) -> dict[str, str]:
        """Return the metadata that a file needs besides the tensors, in the form of safetensors."""
        return {
            "codec": self.codec.spec,
            "shape": ",".join(map(str, self.shape)),
            "dtype": str(self.dtype).removeprefix("torch."),
            "role": self.role,
            "layer": str(self.layer),
            "offset": str(self.offset),
            **({"revision": str(self.codec.revision)} if self.codec.revision != 1 else {}),
        }

    @staticmethod
    def from_parts(metadata: Mapping[str, str], tensors: Mapping[str, Tensor], codec: Codec | None = None) -> Packed:
        """Inverse of `metadata` and `tensors`. Give `codec` where its spec alone does not define it."""
        from tessera.codecs.registry import get

        try:
            spec, role = metadata["codec"], metadata["role"]
            shape = tuple(int(n) for n in metadata["shape"].split(","))
            dtype, layer, offset = metadata["dtype"], int(metadata["layer"]), int(metadata["offset"])
            revision = int(metadata.get("revision", "1"))  # the first revision did not record itself
        except (KeyError, ValueError) as error:
            raise ValueError(f"this is no packed cache: its header lacks or garbles {brief(error)}") from None
        if role not in ("key", "value"):
            raise ValueError(f"this is no packed cache: role {brief(role)!r}")
        given = codec
        codec = (get(spec) if given is None else given).side(role)  # type: ignore[arg-type]
        if given is not None and codec.spec != spec:
            raise ValueError(f"this was encoded by {spec!r}, not by {given.spec!r}")
        if revision != codec.revision:
            raise ValueError(
                f"this was encoded by revision {revision} of {spec!r}; this version reads revision {codec.revision}"
            )
        names = {str(x).removeprefix("torch."): x for x in DTYPES}
        if len(shape) != 4 or min(shape) < 0 or shape[3] == 0 or max(shape) > MOST:
            raise ValueError(f"this is no packed cache: shape {brief(shape)}")
        if dtype not in names or not 0 <= layer <= MOST or not 0 <= offset < codec.group:
            raise ValueError(f"this is no packed cache: dtype {brief(dtype)!r}, layer {brief(layer)}, offset {brief(offset)}")
        packed = Packed(codec, dict(tensors), shape, names[dtype], role, layer, offset)  # type: ignore[arg-type]
        packed._check()
        return packed

    def _check(self) -> None:
        """Refuse tensors that do not fit the shape or that no encoding produces, as in a damaged file."""
        batch, heads, tokens, dim = self.shape
        wanted = self.codec.kept(heads, dim, self.role)
        if missing := set(wanted) - set(self.tensors):
            raise ValueError(f"field {min(missing)!r} of {self.describe()} is missing")
        groups = -(-(self.offset + tokens) // self.codec.group) if tokens else 0
        # The ragged field last: its length is the number of bits set in "flags", which has been checked by then.
        for name, tensor in sorted(self.tensors.items(), key=lambda item: self.codec.fields.get(item[0]) == "ragged"):
            if name not in wanted:
                raise ValueError(f"field {brief(name)!r} does not belong to {self.describe()}")
            rest, dtype = wanted[name]
            layout = self.codec.fields[name]
            if layout == "ragged":
                shape = (int(_set_bits(self.tensors["flags"]).sum()), *rest)
            else:
                shape = (batch, heads, tokens if layout == "token" else groups, *rest)
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(
                    f"field {name!r} of shape {tuple(tensor.shape)}, {tensor.dtype}, does not fit {self.describe()}: "
                    f"it would be {shape}, {dtype}"
                )
            if name == "flags" and _set_bits(tensor)[..., -(-dim // 4) :].any():
                raise ValueError(
                    f"field 'flags' of {self.describe()} is damaged: it has bits for more than {-(-dim // 4)} chunks"
                )
        self.codec.check(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file."""
        with atomic_path(path) as temporary:
            save_file({k: v.contiguous() for k, v in self.tensors.items()}, temporary, self.metadata())

    @staticmethod
    def load(path: str | os.PathLike[str], codec: Codec | None = None) -> Packed:
        """Read what `save` wrote.

        Args:
            path: path of the file.
            codec: what encoded it, where the spec in the file alone does not define it.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged, holds something else, or was encoded by another codec.
        """
        with open_tensors(path, "is no packed cache") as file:
            try:
                return Packed.from_parts(file.metadata, {name: file.get(name) for name in file.names}, codec)
            except ValueError as error:
                raise ValueError(f"{os.fspath(path)}: {brief(error, WHOLE)}") from None


class Codec(ABC):
    """x -> packed bytes -> x̂.

    A codec keeps no state between calls. The result for a token depends on nothing but that token, or, where `group` is
    not 1, on the tokens of its group; groups are counted from the first token of the call; or, if `by_call`, on all tokens of
    the call. Other heads never matter; other batch rows only for one rule of outliers, which is for comparison.

    Attributes:
        spec: the name that `tessera.codecs.get` turns into an equal codec.
        group: tokens that are encoded together.
        by_call: a median over all tokens of a call decides what is kept of each, so a cache must encode the same tokens
            together however calls were cut.
        fields: layout of every tensor that may be kept.
        revision: a number that changes when the meaning of the tensors changes.
        weighs: keys are to be multiplied by the widths of their channels (`key_stats`) before they are encoded, and `encode`
            takes weights of the errors of channels.
        summarises: `summary` gives means and spreads of each block of keys, for sparse reading.
    """

    spec: str
    group: int = 1
    by_call: bool = False
    weighs: bool = False
    summarises: bool = False
    revision: int = 1
    fields: Mapping[str, Layout]

    def side(self, role: Role) -> Codec:
        """Return the codec of keys, or of values: this codec itself, except for a pair, see `codecs.pair`."""
        return self

    def encode(
        self,
        x: Tensor,
        role: Role = "value",
        layer: int = 0,
        *,
        weights: Tensor | None = None,
        tell: Callable[[Tensor], None] | None = None,
    ) -> Packed:
        """Pack keys or values.

        Args:
            x: (batch, kv_heads, tokens, head_dim), float32, bfloat16 or float16; any number of tokens. Autocast changes
                nothing.
            role: "key" or "value"; some codecs treat them differently.
            layer: index of the layer, for codebooks drawn per layer.
            weights: (batch, kv_heads, head_dim) float32, positive: weight of a squared error of each channel; the format does
                not depend on it. None: equal weights. Codecs for which `weighs` is false ignore it.
            tell: called with whether there is a number that is not finite, () bool on the device of `x`, instead of an error,
                which would make the host wait; such numbers are encoded as zeros. None: they are refused.

        Raises:
            ValueError: for another shape or role, or, without `tell`, values that are not finite.
            TypeError: for a dtype that is not floating point.
        """
        if x.ndim != 4 or x.shape[-1] == 0:
            raise ValueError(f"{self.spec}: x must be (batch, kv_heads, tokens, head_dim), got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{self.spec}: x must be floating point, got {x.dtype}")
        if role not in ("key", "value"):
            raise ValueError(f"{self.spec}: role must be 'key' or 'value', got {role!r}")
        wide = x.detach().float()
        if tell is None:
            # One pass finds numbers that are not finite, or too large.
            least, most = torch.stack(wide.aminmax()).tolist() if wide.numel() else (0.0, 0.0)
            if not (math.isfinite(least) and math.isfinite(most)):
                bad = int((~torch.isfinite(wide)).sum())
                raise ValueError(f"{self.spec}: {bad} of {wide.numel()} {role}s of layer {layer} are NaN or infinite")
            large = max(-least, most) > HUGE
        else:
            tell(~wide.isfinite().all())
            wide, large = torch.where(wide.isfinite(), wide, 0.0), True
        shape = (x.shape[0], x.shape[1], x.shape[2], x.shape[3])
        # Autocast would round the products with a rotation or a codebook to half precision.
        with no_autocast(x.device):
            wide = wide.clamp(-HUGE, HUGE) if large else wide
            if weights is not None and self.weighs:
                tensors = self._encode_weighed(wide, role, layer, weights)
            else:
                tensors = self._encode(wide, role, layer)
        return Packed(self.side(role), tensors, shape, x.dtype, role, layer)

    def summary(self, pages: Sequence[Packed]) -> tuple[Tensor, Tensor]:
        """Summarise the keys of each group without decoding them, for codecs with `summarises`.

        Args:
            pages: keys, whole groups.

        Returns:
            their means (batch, kv_heads, groups, head_dim), and the largest root mean square, over channels, of a key minus the
            mean (batch, kv_heads, groups), both float32.
        """
        raise NotImplementedError

    def decode(self, packed: Packed) -> Tensor:
        """(batch, kv_heads, tokens, head_dim) in the dtype that was encoded, the same under autocast as without."""
        if 0 in packed.shape:
            return torch.empty(packed.shape, dtype=packed.dtype, device=packed.device)
        # An approximation of the largest half-precision numbers can lie beyond them.
        most = min(torch.finfo(packed.dtype).max, torch.finfo(torch.float32).max)
        with no_autocast(packed.device):
            return dispatch.decode(packed).clamp(-most, most).to(packed.dtype)

    def kernel_format(self, dim: int) -> Format | None:
        """Return the format of the codes for kernels, for vectors of `dim` numbers; None if no kernel reads this codec."""
        return None

    def kept(self, heads: int, dim: int, role: Role) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return what `encode` keeps of vectors of `dim` numbers: for each field the shape after the layout's, and the dtype.

        Raises:
            ValueError: if the codec is for another number of heads.
        """
        none = self._encode(torch.zeros(1, 1, 0, dim, dtype=torch.float32), role, 0)
        return {name: (tuple(x.shape[1 if self.fields[name] == "ragged" else 3 :]), x.dtype) for name, x in none.items()}

    def check(self, packed: Packed) -> None:
        """Check tensors of the right shapes for values that no encoding produces.

        Raises:
            ValueError: naming the field.
        """
        for name, x in packed.tensors.items():
            if x.is_floating_point() and not x.isfinite().all():
                raise ValueError(f"field {name!r} of {packed.describe()} is damaged: it has numbers that are not finite")

    @abstractmethod
    def _encode(self, x: Tensor, role: Role, layer: int) -> Mapping[str, Tensor]:
        """x: finite float32 (batch, kv_heads, tokens, head_dim) -> the tensors to keep."""

    def _encode_weighed(self, x: Tensor, role: Role, layer: int, weights: Tensor) -> Mapping[str, Tensor]:
        """Do what `_encode` does with weighted errors, for codecs with `weighs`."""
        raise NotImplementedError

    @abstractmethod
    def decode_reference(self, packed: Packed) -> Tensor:
        """The definition of `decode`, in float32; where there are kernels for the codec these are used."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Codec) and type(self) is type(other) and self.spec == other.spec

    def __hash__(self) -> int:
        return hash((type(self), self.spec))


def group_index(packed: Packed) -> Tensor:
    """Find the index of each token's group among the kept ones: (tokens,) int64."""
    return (torch.arange(packed.tokens, device=packed.device) + packed.offset) // packed.codec.group


def check_codes(packed: Packed, bits: int, count: int) -> None:
    """Refuse codes of chunks of four numbers, `bits` each, that are not less than `count`.

    Raises:
        ValueError: saying so.
    """
    if count == 1 << bits:
        return
    chunks = -(-packed.shape[3] // 4)
    for part in packed.tensors["codes"].split(PART, dim=2):
        if part.numel() and int(unpack_bits(part, bits, chunks).max()) >= count:
            raise ValueError(f"field 'codes' of {packed.describe()} is damaged: it has codes that no codeword has")


def _copy_of(fields: Mapping[str, Tensor], name: str) -> Tensor:
    return fields[name].clone()


def _part_of(fields: Mapping[str, Tensor], name: str, ends: HostCopy, start: int, stop: int) -> Tensor:
    """The rows of a ragged field for the tokens [start, stop). ends: (tokens + 1,), how many rows come before each token."""
    known = ends.get()
    return fields[name][int(known[start]) : int(known[stop])]


def _joined(parts: list[Mapping[str, Tensor]], name: str) -> Tensor:
    return join([fields[name] for fields in parts], 0)


def _set_bits(bitmap: Tensor) -> Tensor:
    """(..., bytes) uint8 -> (..., 8 · bytes) of 0 and 1, int64."""
    return unpack_bits(bitmap, 1, 8 * bitmap.shape[-1])
