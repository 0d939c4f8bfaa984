"""Which implementation of a kernel runs: the fastest that can, or the one that is asked for."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from tessera.kernels import cpu, paged, reference, triton
from tessera.kernels.cpu import encode as cpu_encode
from tessera.kernels.cpu import grid as cpu_grid
from tessera.kernels.cpu import paged as cpu_paged
from tessera.kernels.feedback import encode_feedback as reference_encode_feedback
from tessera.kernels.grid import Gates, Steps
from tessera.kernels.grid import advance as reference_advance
from tessera.kernels.nearest import Codewords
from tessera.kernels.nearest import nearest as reference_nearest
from tessera.kernels.nearest_directions import nearest_directions as reference_nearest_directions
from tessera.kernels.pages import Coded, Pages
from tessera.kernels.precision import without_autocast
from tessera.kernels.triton import paged as triton_paged

#: What TESSERA_BACKEND and `backend` may say.
BACKENDS = ("auto", "reference", "cpu", *(f"cpu:{level}" for level in cpu.LEVELS), "triton")


def chosen(backend: str | None) -> str:
    """The backend asked for by argument, or else by the environment, or "auto".

    Raises:
        ValueError: if there is none of that name, or the processor lacks its instructions.
    """
    name = backend or os.environ.get("TESSERA_BACKEND") or "auto"
    if name not in BACKENDS:
        raise ValueError(f"no backend {name!r}; there are {', '.join(BACKENDS)}")
    level = name.partition(":")[2]
    if level and level not in cpu.levels():
        why = cpu.MISSING or f"this processor has {', '.join(cpu.levels())}"
        raise ValueError(f"backend {name!r} cannot run: {why}")
    return name


@without_autocast
def attend(
    q: Tensor,
    pages: Pages,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    *,
    start: int | None = None,
    window: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Partial attention over a packed tier, see `tessera.kernels.reference.attend`.

    Args:
        q, pages, scale, mask, softcap, start, window: as there.
        backend: one of `BACKENDS`; None: what the environment variable TESSERA_BACKEND says, or "auto", the fastest.

    Raises:
        ValueError: if a backend is asked for that cannot do it, saying why.
    """
    name = chosen(backend)
    family, _, level = name.partition(":")
    if family in ("cpu", "triton"):
        why = (cpu if family == "cpu" else triton).attend_refusal(q, pages)
        if why is not None:
            raise ValueError(f"backend {name!r} cannot run: {why}")
    if family == "triton" or (family == "auto" and q.is_cuda and triton.attend_refusal(q, pages) is None):
        return triton.attend(q, pages, scale, mask, softcap, start=start, window=window)
    if family == "cpu" or (family == "auto" and cpu.attend_refusal(q, pages) is None):
        return cpu.attend(q, pages, scale, mask, softcap, start=start, window=window, level=level or None)
    if family == "auto":
        why = triton.missing() if q.is_cuda else cpu.MISSING
        if why is not None:
            say_once("attention over the compressed cache", why)
    return reference.attend(q, pages, scale, mask, softcap, start=start, window=window)


@without_autocast
def attend_exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    *,
    start: int | None = None,
    window: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Partial attention over keys and values as they are, see `tessera.kernels.reference.attend_exact`.

    In C++ for the few queries of a decoding step on a CPU, else in PyTorch. `backend`: see `attend`.
    """
    family, _, level = chosen(backend).partition(":")
    if family in ("auto", "cpu") and cpu.attend_exact_refusal(q, k, v) is None:
        return cpu.attend_exact(q, k, v, scale, mask, softcap, start=start, window=window, level=level or None)
    return reference.attend_exact(q, k, v, scale, mask, softcap, start=start, window=window)


def exact_in_cpp(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attend_exact` would run in C++."""
    return chosen(None).partition(":")[0] in ("auto", "cpu") and cpu.attend_exact_refusal(q, k, v) is None


def _in_triton(family: str, device: torch.device) -> bool:
    """Whether Triton is to work on tensors of a device: on a GPU, and where it is asked for interpreted too."""
    there = device.type == "cuda" or (family == "triton" and triton.interpreted())
    return family in ("auto", "triton") and there and triton.missing() is None


def merge(parts: Sequence[tuple[Tensor, Tensor]], backend: str | None = None) -> tuple[Tensor, Tensor]:
    """One softmax over the keys of all parts, see `tessera.kernels.reference.merge`. `backend`: see `attend`."""
    family = chosen(backend).partition(":")[0]
    tensors = [x for part in parts for x in part]
    if len(parts) > 1 and all(x.dtype == torch.float32 and not x.requires_grad for x in tensors):
        devices = {x.device.type for x in tensors}
        if devices == {"cpu"} and cpu.MISSING is None and family in ("auto", "cpu"):
            return cpu.merge(parts)
        if len(devices) == 1 and _in_triton(family, tensors[0].device):
            return triton.merge(parts)
    return reference.merge(parts)


@without_autocast
def attend_paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pool: Tensor,
    ring: Tensor,
    layout: paged.BlockLayout,
    step: paged.Step,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    drains: Tensor | None = None,
    *,
    out: Tensor,
    backend: str | None = None,
) -> None:
    """Attention of an engine's step by block table; the rings then hold the step's newest tokens. See `tessera.kernels.paged`.

    Args:
        q, k, v, pool, ring, layout, step, scale, softcap, window, drains: as for `tessera.kernels.paged.attend_paged`.
        out: (tokens, q_heads, head_dim), takes the result.
        backend: see `attend`.

    Raises:
        ValueError: if a backend is asked for that cannot do it, saying why.
    """
    name = chosen(backend)
    family, _, level = name.partition(":")
    if family in ("auto", "cpu"):
        why = cpu_paged.refusal(q, layout)
        if why is None:
            cpu_paged.attend_paged(
                q, k, v, pool, ring, layout, step, scale, softcap, window, drains, out=out, level=level or None
            )
            return
        if family == "cpu":
            raise ValueError(f"backend {name!r} cannot run: {why}")
        if q.device.type == "cpu" and cpu.MISSING is not None:
            say_once("attention over packed pages", cpu.MISSING)
    why = triton_paged.refusal(q, layout)
    if family == "triton" and why is not None:
        raise ValueError(f"backend {name!r} cannot run: {why}")
    in_triton = family == "triton" or (family == "auto" and q.is_cuda and why is None)
    run = triton_paged.attend_paged if in_triton else paged.attend_paged
    out.copy_(run(q, k, v, pool, ring, layout, step, scale, softcap, window, drains))
    paged.fill_rings(k, v, ring, layout, step)


def collect(
    k: Tensor, v: Tensor, pool: Tensor, ring: Tensor, layout: paged.BlockLayout, step: paged.Step, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Groups that a step makes whole, see `tessera.kernels.paged.collect`. `backend`: see `attend`."""
    if chosen(backend).partition(":")[0] in ("auto", "cpu") and cpu_paged.refusal(k, layout) is None:
        return cpu_paged.collect(k, v, pool, ring, layout, step)
    return paged.collect(k, v, ring, layout, step)


def decode(packed: Coded, backend: str | None = None) -> Tensor | None:
    """Decoded vectors in float32, or None where only the codec itself can decode them. `backend`: see `attend`."""
    family, _, level = chosen(backend).partition(":")
    if _in_triton(family, packed.device):
        return triton.decode(packed)
    return cpu.decode(packed, level or None) if family in ("auto", "cpu") else None


_SEARCH = "the search for the nearest codeword"


@without_autocast
def nearest(x: Tensor, book: Codewords, backend: str | None = None) -> Tensor:
    """Codes of the nearest codewords: (n, 4) float32 -> (n,) integers.

    Args:
        x: chunks, finite.
        book: the codebook, on the CPU.
        backend: see `attend`.

    Returns:
        (n,). Where two codewords are equally near to within rounding, either.
    """
    name = chosen(backend)
    if name.startswith("cpu") and (cpu.MISSING is not None or x.device.type != "cpu"):
        raise ValueError(f"backend {name!r} cannot run: {cpu.MISSING or f'the chunks are on {x.device}'}")
    if name == "triton" and not _in_triton(name, x.device):
        raise ValueError(f"backend {name!r} cannot run: {triton.missing() or f'the chunks are on {x.device}'}")
    if name != "reference" and name != "triton" and x.device.type == "cpu" and cpu.MISSING is None:
        return cpu_encode.nearest(x, book, name.partition(":")[2] or None)
    if name == "auto" and x.device.type == "cpu" and cpu.MISSING is not None:
        say_once(_SEARCH, cpu.MISSING)
    search = triton.nearest if _in_triton(name, x.device) else reference_nearest
    return book.codes.to(x.device)[search(x, book.index_on(x.device))]


@without_autocast
def nearest_directions(chunks: Tensor, turns: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The best product of a unit and a secondary quaternion, see `tessera.kernels.nearest_directions`.

    `backend`: see `attend`; there is no Triton kernel for it.
    """
    name = chosen(backend)
    if name.partition(":")[0] in ("auto", "cpu") and chunks.device.type == "cpu":
        if cpu.MISSING is None:
            return cpu.nearest_directions(chunks, turns)
        if name == "auto":
            say_once(_SEARCH, cpu.MISSING)
    return reference_nearest_directions(chunks, turns)


def encode_feedback(y: Tensor, feedback: Tensor, book: Codewords, backend: str | None = None) -> Tensor:
    """Codes of vectors with the errors of later chunks fed back, see `tessera.kernels.feedback.encode_feedback`.

    Args:
        y, feedback, book: as there.
        backend: see `attend`; there is no Triton kernel for it.
    """
    if y.shape[-1] % 4 or feedback.shape != (y.shape[0], y.shape[2], y.shape[2]):
        raise ValueError(
            f"vectors of a multiple of four numbers and a square matrix for each head are needed, got {tuple(y.shape)} and "
            f"{tuple(feedback.shape)}"
        )
    name = chosen(backend)
    if _in_cpp(name, y, feedback):
        return cpu_encode.encode_feedback(y.detach(), feedback.detach(), book, name.partition(":")[2] or None)
    if name.startswith("cpu"):
        raise ValueError(f"backend {name!r} cannot run: {cpu.float32_refusal((y, feedback))}")
    if name == "auto" and y.device.type == "cpu" and cpu.MISSING is not None:
        say_once(_SEARCH, cpu.MISSING)
    return reference_encode_feedback(y, feedback, book)


def _in_cpp(name: str, *given: Tensor | None) -> bool:
    """Whether codes of float32 numbers are made in C++."""
    return name.partition(":")[0] in ("auto", "cpu") and cpu.float32_refusal(given) is None


def pack_nearest(x: Tensor, scale: Tensor, book: Codewords, bits: int, backend: str | None = None) -> Tensor | None:
    """Packed codes of the codewords nearest to the chunks of vectors, or None where `nearest` must find them.

    Args:
        x: (..., d) float32, finite; the last chunk is filled up with zeros.
        scale: (...), what the vectors are divided by; where it is zero the codes are zero.
        book: the codebook.
        bits: of a code.
        backend: see `attend`.

    Returns:
        (..., bytes) uint8, as `tessera.codecs.bits.pack_bits` has them.
    """
    name = chosen(backend)
    return cpu_encode.pack_nearest(x, scale, book, bits, name.partition(":")[2] or None) if _in_cpp(name, x, scale) else None


def pack_linear(
    x: Tensor, low: Tensor | None, scale: Tensor, limits: tuple[int, int], bits: int, *, group: int, span: int
) -> Tensor | None:
    """Packed codes round((x - low) / scale), between limits and counted from the lower; None where PyTorch must do it.

    Args:
        x: (..., tokens, d) float32.
        low, scale: (..., ceil(tokens / group), ceil(d / span)) float32; low None: zero, if span is not 1.
        limits: whole numbers.
        bits: of a code, 1 to 8.
        group, span: tokens and channels that share a low and a scale.

    Returns:
        (..., tokens, bytes) uint8, bit for bit what PyTorch's division, rounding and `pack_bits` give.
    """
    return cpu_encode.pack_linear(x, low, scale, *limits, bits, group, span) if _in_cpp(chosen(None), x, low, scale) else None


def pack_levels(
    x: Tensor, divisor: Tensor, factor: float, bounds: Tensor, values: Tensor, bits: int
) -> tuple[Tensor, Tensor] | None:
    """Packed numbers of the intervals in which x / divisor * factor lies; None where PyTorch must find them.

    Args:
        x: (..., d) float32.
        divisor: (..., 1).
        factor: see above.
        bounds: (2^bits - 1,) float32, between the intervals, ascending; an interval includes its upper bound.
        values: (2^bits,) float32, one for each interval.
        bits: of a code, 1 to 8.

    Returns:
        The codes (..., bytes) uint8, bit for bit what `torch.bucketize` and `pack_bits` give, and their values (..., d).
    """
    if not _in_cpp(chosen(None), x, divisor, bounds, values):
        return None
    return cpu_encode.pack_levels(x, divisor, factor, bounds, values, bits)


def pack_blocks(x: Tensor, ratio: Tensor, scale: Tensor, bits: int) -> Tensor | None:
    """ggml's blocks q4_0 or q8_0, see `tessera.codecs.blocks`; None where PyTorch must make them.

    Args:
        x: (..., 32) float32.
        ratio: (..., 1) float32, what the numbers are multiplied by.
        scale: (..., 1) float16, what the block keeps.
        bits: 4 or 8.

    Returns:
        (..., 2 + 4 bits) uint8, bit for bit what PyTorch's operations give.
    """
    return cpu_encode.pack_blocks(x, ratio, scale, bits) if _in_cpp(chosen(None), x, ratio) else None


@without_autocast
def advance(h: Tensor, c: Tensor, steps: Steps, gates: Gates, backend: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence of a grid of cells, see `tessera.kernels.grid.advance`.

    Args:
        h, c, steps, gates: as there.
        backend: see `attend`; on a GPU "triton" is the form in PyTorch with its steps compiled to Triton by `torch.compile`.

    Raises:
        ValueError: if a backend is asked for that cannot do it, saying why.
    """
    name = chosen(backend)
    family, _, level = name.partition(":")
    if family in ("auto", "cpu"):
        why = cpu_grid.refusal(h, steps, gates)
        if why is None:
            return cpu_grid.advance(h, c, steps, gates, level or None)
        if family == "cpu":
            raise ValueError(f"backend {name!r} cannot run: {why}")
        if h.device.type == "cpu" and cpu.MISSING is not None:
            say_once("the recurrence of a Tensor Memory", cpu.MISSING)
    if family == "triton" and (triton.missing() is not None or not h.is_cuda):
        raise ValueError(f"backend {name!r} cannot run: {triton.missing() or f'the grid is on {h.device}'}")
    return reference_advance(h, c, steps, gates, compiled=family == "triton")


@cache
def say_once(what: str, why: str) -> None:
    """Warn that something runs in plain PyTorch, and why; of the same thing once."""
    warnings.warn(f"{what} runs in plain PyTorch, which is slow: {why}", stacklevel=4)
