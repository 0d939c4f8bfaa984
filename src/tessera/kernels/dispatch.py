"""All operations that have kernels, each with its implementations; `tessera.kernels.operations` chooses among them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tessera.kernels import compressed_kv, cpu, directions, error_feedback, pack, paged, recurrent_grid, reference, triton
from tessera.kernels.compressed_kv import Coded, CompressedKV
from tessera.kernels.cpu import cpu_paged, sources, tiled
from tessera.kernels.cpu import encode as cpu_encode
from tessera.kernels.cpu import grid as cpu_grid
from tessera.kernels.joint import JointFormat
from tessera.kernels.nearest import Codewords
from tessera.kernels.operations import BACKENDS, OPERATIONS, Implementation, Operation, chosen, say_once
from tessera.kernels.params import AttendParams
from tessera.kernels.precision import no_autocast, without_autocast
from tessera.kernels.recurrent_grid import Gates, Steps
from tessera.kernels.source import Source
from tessera.kernels.triton import triton_paged

__all__ = ["BACKENDS", "OPERATIONS", "chosen", "say_once"]

_SEARCH = "the search for the nearest codeword"

ATTEND = Operation(
    "attend",
    "attention over the compressed cache",
    Implementation("reference", reference, "attend"),
    [
        Implementation("cpu", tiled, "attend", tiled.attend_refusal, levels=True),
        Implementation("triton", triton, "attend", lambda q, tier, params: triton.attend_refusal(q, tier)),
    ],
)
ATTEND_EXACT = Operation(
    "attend_exact",
    "attention over exact keys and values",
    Implementation("reference", reference, "attend_exact"),
    [Implementation("cpu", tiled, "attend_exact", tiled.attend_exact_refusal, levels=True)],
    strict=False,
    quiet=True,
)
ATTEND_PAGED = Operation(
    "attend_paged",
    "attention over packed pages",
    Implementation("reference", paged, "attend_step"),
    [
        Implementation("cpu", cpu_paged, "attend_paged", lambda call: cpu_paged.refusal(call.q, call.layout), levels=True),
        Implementation("triton", triton_paged, "attend_step", lambda call: triton_paged.refusal(call.q, call.layout)),
    ],
)
COLLECT = Operation(
    "collect",
    "the gathering of whole groups",
    Implementation("reference", paged, "collect_from"),
    [Implementation("cpu", cpu_paged, "collect", lambda k, v, pool, ring, layout, step: cpu_paged.refusal(k, layout))],
    strict=False,
    quiet=True,
)
MERGE = Operation(
    "merge",
    "the merging of parts by log-sum-exp",
    Implementation("reference", reference, "merge"),
    [
        Implementation("cpu", cpu, "merge", cpu.merge_refusal),
        Implementation("triton", triton, "merge", triton.merge_refusal),
    ],
    strict=False,
    quiet=True,
)
DECODE = Operation(
    "decode",
    "the decoding of packed vectors",
    Implementation("reference", compressed_kv, "decode_reference"),
    [
        Implementation("cpu", cpu, "decode", cpu.decode_refusal, levels=True),
        Implementation("triton", triton, "decode", triton.decode_refusal),
    ],
    strict=False,
    quiet=True,
)
NEAREST = Operation(
    "nearest",
    _SEARCH,
    Implementation("reference", pack, "nearest_codes"),
    [
        Implementation("cpu", cpu_encode, "nearest", cpu.chunks_refusal, levels=True),
        Implementation("triton", triton, "nearest_codes", lambda x, book: triton.device_refusal(x)),
    ],
)
NEAREST_DIRECTIONS = Operation(
    "nearest_directions",
    _SEARCH,
    Implementation("reference", directions, "nearest_directions"),
    [Implementation("cpu", cpu, "nearest_directions", cpu.chunks_refusal)],
    strict=False,
)
ENCODE_FEEDBACK = Operation(
    "encode_feedback",
    _SEARCH,
    Implementation("reference", error_feedback, "encode_feedback"),
    [
        Implementation(
            "cpu", cpu_encode, "encode_feedback", lambda y, matrix, book: cpu.float32_refusal((y, matrix)), levels=True
        ),
        Implementation("triton", triton, "encode_feedback", lambda y, matrix, book: triton.device_refusal(y)),
    ],
)
PACK_NEAREST = Operation(
    "pack_nearest",
    _SEARCH,
    Implementation("reference", pack, "pack_nearest"),
    [
        Implementation(
            "cpu", cpu_encode, "pack_nearest", lambda x, scale, book, bits: cpu.float32_refusal((x, scale)), levels=True
        ),
        Implementation("triton", triton, "pack_nearest", lambda x, scale, book, bits: triton.device_refusal(x)),
    ],
    strict=False,
)
PACK_LINEAR = Operation(
    "pack_linear",
    "uniform codes",
    Implementation("reference", pack, "pack_linear"),
    [Implementation("cpu", cpu_encode, "pack_linear", lambda x, low, scale, *_: cpu.float32_refusal((x, low, scale)))],
    strict=False,
    quiet=True,
)
PACK_LEVELS = Operation(
    "pack_levels",
    "codes of levels",
    Implementation("reference", pack, "pack_levels"),
    [
        Implementation(
            "cpu",
            cpu_encode,
            "pack_levels",
            lambda x, divisor, factor, bounds, values, bits: cpu.float32_refusal((x, divisor, bounds, values)),
        )
    ],
    strict=False,
    quiet=True,
)
PACK_BLOCKS = Operation(
    "pack_blocks",
    "ggml's blocks",
    Implementation("reference", pack, "pack_blocks"),
    [Implementation("cpu", cpu_encode, "pack_blocks", lambda x, ratio, scale, bits: cpu.float32_refusal((x, ratio)))],
    strict=False,
    quiet=True,
)
ADVANCE = Operation(
    "advance",
    "the recurrence of a Tensor Memory",
    Implementation("reference", recurrent_grid, "advance"),
    [
        Implementation("cpu", cpu_grid, "advance", lambda h, c, steps, gates: cpu_grid.refusal(h, steps, gates), levels=True),
        Implementation("triton", recurrent_grid, "advance_compiled", lambda h, *_: triton.device_refusal(h), asked=True),
    ],
)


@without_autocast
def attend(q: Tensor, tier: CompressedKV, params: AttendParams, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Partial attention over a packed tier, see `tessera.kernels.reference.attend`.

    Args:
        q, params: as there.
        tier: the pages.
        backend: one of `BACKENDS`; None: what the environment variable TESSERA_BACKEND says, or "auto", the fastest.

    Raises:
        ValueError: if a backend is asked for that cannot do it, saying why.
    """
    found: tuple[Tensor, Tensor] = ATTEND(q, tier, params, backend=backend)
    return found


@without_autocast
def attend_exact(q: Tensor, k: Tensor, v: Tensor, params: AttendParams, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Partial attention over unquantised keys and values, see `tessera.kernels.reference.attend_exact`.

    On a CPU it runs in C++ for the few queries of a decoding step, and by PyTorch's flash attention for many. `backend`: see
    `attend`.
    """
    found: tuple[Tensor, Tensor] = ATTEND_EXACT(q, k, v, params, backend=backend)
    return found


def attend_sources(
    q: Tensor, given: Sequence[Source], scale: float, softcap: float | None = None, backend: str | None = None
) -> Tensor | None:
    """Attention to several sources in one softmax by one call into C++, for a few queries on a CPU.

    Args:
        q: (batch, q_heads, q_tokens, head_dim).
        given: at least one source.
        scale, softcap: see `AttendParams`.
        backend: see `attend`.

    Returns:
        (batch, q_heads, q_tokens, head_dim) float32, 0 where a query sees nothing; None where it is impossible or slower: the
        caller then uses `attend`, `attend_exact` and `merge`.
    """
    family, _, level = chosen(backend).partition(":")
    if family not in ("auto", "cpu"):
        return None
    return sources.attend_sources(q, given, scale, softcap, level=level or None)


def attend_newest(
    q: Tensor, tiers: Sequence[tuple[Tensor, Tensor, int]], pages: CompressedKV | None, scale: float, backend: str | None = None
) -> Tensor | None:
    """Attention of the newest token of every row to all tokens, itself included: `attend_sources` without positions.

    Args:
        q: (batch, q_heads, 1, head_dim).
        tiers: at least one buffer of keys and one of values, both contiguous (batch, kv_heads, at least n, head_dim), and
            their number of tokens n.
        pages: packed tokens; None: there are none.
        scale: see `AttendParams`.
        backend: see `attend`.

    Returns:
        (batch, q_heads, 1, head_dim) float32; None where it is impossible: the caller then uses the other operations.
    """
    family, _, level = chosen(backend).partition(":")
    if family not in ("auto", "cpu"):
        return None
    return sources.attend_newest(q, tiers, pages, scale, level=level or None)


def exact_family(q: Tensor, k: Tensor, v: Tensor, params: AttendParams) -> str:
    """Return the family whose `attend_exact` would run."""
    return ATTEND_EXACT.choose(None, q, k, v, params)[0].family


def merge(parts: Sequence[tuple[Tensor, Tensor]], backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Merge partial results into one softmax, see `tessera.kernels.reference.merge`. `backend`: see `attend`."""
    found: tuple[Tensor, Tensor] = MERGE(parts, backend=backend)
    return found


def attend_paged(call: paged.PagedCall, *, out: Tensor, backend: str | None = None) -> None:
    """Attention of an engine's step by block table; the rings then hold the step's newest tokens. See `tessera.kernels.paged`.

    Args:
        call: what it takes.
        out: (tokens, q_heads, head_dim), takes the result.
        backend: see `attend`.

    Raises:
        ValueError: if a backend is asked for that cannot do it, saying why.
    """
    with no_autocast(call.q.device):
        ATTEND_PAGED(call, out=out, backend=backend)


def collect(
    k: Tensor, v: Tensor, pool: Tensor, ring: Tensor, layout: paged.BlockLayout, step: paged.Step, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Collect the groups that a step completes, see `tessera.kernels.paged.collect`. `backend`: see `attend`."""
    found: tuple[Tensor, Tensor] = COLLECT(k, v, pool, ring, layout, step, backend=backend)
    return found


def decode(packed: Coded, backend: str | None = None) -> Tensor:
    """Decoded vectors, (batch, heads, tokens, head_dim) float32. `backend`: see `attend`."""
    found: Tensor = DECODE(packed, backend=backend)
    return found


@without_autocast
def nearest(x: Tensor, book: Codewords, backend: str | None = None) -> Tensor:
    """Codes of the nearest codewords, see `tessera.kernels.pack.nearest_codes`: (n, 4) float32 -> (n,) integers.

    `backend`: see `attend`.
    """
    found: Tensor = NEAREST(x, book, backend=backend)
    return found


@without_autocast
def nearest_directions(chunks: Tensor, rotations: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The best products of a unit and a secondary quaternion, see `tessera.kernels.directions`."""
    found: tuple[Tensor, Tensor] = NEAREST_DIRECTIONS(chunks, rotations, backend=backend)
    return found


def encode_feedback(y: Tensor, matrix: Tensor, book: Codewords, backend: str | None = None) -> Tensor:
    """Codes of vectors with the errors of later chunks fed back, see `tessera.kernels.error_feedback.encode_feedback`.

    Args:
        y, matrix, book: as there.
        backend: see `attend`.

    Raises:
        ValueError: for other shapes, or a backend that cannot do it.
    """
    if y.shape[-1] % 4 or matrix.shape != (y.shape[0], y.shape[2], y.shape[2]):
        raise ValueError(
            f"vectors of a multiple of four numbers and a square matrix for each head are needed, got {tuple(y.shape)} and "
            f"{tuple(matrix.shape)}"
        )
    found: Tensor = ENCODE_FEEDBACK(y.detach(), matrix.detach(), book, backend=backend)
    return found


def encode_joint(
    x: Tensor, form: JointFormat, words: Codewords, centred: bool, weights: Tensor | None, backend: str | None = None
) -> dict[str, Tensor] | None:
    """Encode vectors by a joint codebook, from the numbers to the bytes, in one call into C++.

    Args:
        x: (batch, kv_heads, tokens, head_dim) float32, finite.
        form: the format of the codes.
        words: the codebook.
        centred: whether channels are centred over groups of tokens, as keys are.
        weights: (batch, kv_heads, head_dim) float32, see `tessera.codecs.Codec.encode`; None: equal weights.
        backend: see `attend`.

    Returns:
        the tensors that `tessera.codecs.JointHQMQ` keeps; None where it is impossible: the caller then does the same in steps.

    Raises:
        ValueError: for weights of another shape.
    """
    if weights is not None and weights.shape != (*x.shape[:2], x.shape[3]):
        raise ValueError(f"weights {tuple(weights.shape)} do not fit vectors {tuple(x.shape)}: one a row, head and channel")
    family, _, level = chosen(backend).partition(":")
    if family not in ("auto", "cpu") or cpu_encode.encode_joint_refusal(x, form) is not None:
        return None
    return cpu_encode.encode_joint(x, form, words, centred, weights, level=level or None)


def pack_nearest(x: Tensor, scale: Tensor, book: Codewords, bits: int, backend: str | None = None) -> Tensor:
    """Packed codes of the nearest codewords, see `tessera.kernels.pack.pack_nearest`. `backend`: see `attend`."""
    found: Tensor = PACK_NEAREST(x, scale, book, bits, backend=backend)
    return found


def pack_linear(
    x: Tensor, low: Tensor | None, scale: Tensor, limits: tuple[int, int], bits: int, *, group: int, span: int
) -> Tensor:
    """Packed uniform codes, see `tessera.kernels.pack.pack_linear`; the same bytes from every backend."""
    found: Tensor = PACK_LINEAR(x, low, scale, limits, bits, group, span)
    return found


def pack_levels(x: Tensor, divisor: Tensor, factor: float, bounds: Tensor, values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Packed numbers of intervals, see `tessera.kernels.pack.pack_levels`; the same bytes from every backend."""
    found: tuple[Tensor, Tensor] = PACK_LEVELS(x, divisor, factor, bounds, values, bits)
    return found


def pack_blocks(x: Tensor, ratio: Tensor, scale: Tensor, bits: int) -> Tensor:
    """ggml's blocks, see `tessera.kernels.pack.pack_blocks`; the same bytes from every backend."""
    found: Tensor = PACK_BLOCKS(x, ratio, scale, bits)
    return found


@without_autocast
def advance(h: Tensor, c: Tensor, steps: Steps, gates: Gates, backend: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence of a grid of cells, see `tessera.kernels.recurrent_grid.advance`.

    Args:
        h, c, steps, gates: as there.
        backend: see `attend`; "triton" is the form in PyTorch with its steps compiled to Triton by `torch.compile`.

    Raises:
        ValueError: if a backend is asked for that cannot do it, saying why.
    """
    found: tuple[Tensor, Tensor, Tensor] = ADVANCE(h, c, steps, gates, backend=backend)
    return found
