"""Compare the error and the true bits of all codecs, and check that they meet their bars.

True bits count every byte that is kept: codes, scales, flags, centres, outliers, padding. The error is the mean squared error
over the mean square of the input. For keys with giant channels it is taken for each channel over the channel's variance, and
averaged over channels: a constant of a channel changes all scores of a query equally, and giants would dominate the mean.
Gaussian and heavy-tailed vectors are encoded as values; as keys, hqmq keeps a quarter of a bit more, the centres.

Example:

    python benchmarks/codec_error.py --inputs gaussian --json gaussian.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from tessera import codecs
from tessera.codecs import Role
from tessera.evaluation.records import environment
from tessera.files import atomic_path

RESULT = Path(__file__).resolve().parent.parent / "docs" / "results" / "codec_error.json"
HEAD_DIMS = (64, 128)
HEADS = 4
#: Tokens of each head, a multiple of the group size of every codec: groups of a long context are whole.
TOKENS, QUICK_TOKENS = 1024, 64

OURS = ("hqmq:2", "hqmq:2.5", "hqmq:3", "hqmq:3.5", "hqmq:4", "hqmq:4.5", "hqmq:5")
#: Left out by default: its codebook takes ten seconds to index, and it has more bits than any baseline in the bars.
SLOW = ("hqmq:5",)
#: Codecs by kind. The bars compare Tessera's codecs with those named baselines.
FAMILIES: dict[str, tuple[str, ...]] = {
    "HQMQ, Tessera": OURS,
    "HQMQ, optimised units": ("hqmq:o21_r3", "hqmq:o170_r4"),
    "HQMQ, paper": (
        "hqmq:s24_r2",
        "hqmq:s24_r3",
        "hqmq:s48_r4",
        "hqmq:s96_r4",
        "hqmq:s192_r4",
        "hqmq:s192_r6",
        "hqmq:s96_r4_med3",
        "hqmq:s24_r6_med3",
        "hqmq:s96_r6_med3",
        "hqmq:s192_r6_med3",
    ),
    "HQMQ, authors' code": ("hqmq:s96_r4_authors", "hqmq:s192_r6_med3_authors"),
    "integers": ("int:3", "int:4", "int:8"),
    "KIVI": ("kivi:2", "kivi:4"),
    "Lloyd-Max": ("scalar:3", "scalar:4"),
    "llama.cpp": ("q4_0", "q4_0:norot", "q8_0"),
    "fp8": ("fp8", "fp8:scaled"),
}
BASELINES = ("HQMQ, paper", "HQMQ, authors' code", "integers", "KIVI", "Lloyd-Max", "llama.cpp", "fp8")
#: Variants of hqmq:4 that lack the step made for these inputs.
VARIANTS = {"heavy-tailed": ("hqmq:4_norot",), "giant-keys": ("hqmq:4_nocentre",)}

#: (spec, maximum error, maximum bits) on Gaussian values at head_dim 128.
LIMITS = (("hqmq:4", 0.0075, 4.13), ("hqmq:3", 0.0290, 3.13))
#: Range of bits in which no baseline may have a lower error at equal bits.
RANGE = (3.0, 5.0)


@dataclass(frozen=True)
class Row:
    """The result of one codec on one kind of input.

    Attributes:
        codec: its kind, a key of `FAMILIES`.
        spec: its specification.
        head_dim: numbers in a vector.
        inputs: a key of `INPUTS`.
        role: whether they were encoded as keys or values.
        bits: true bits per element.
        nmse: the error.
        vectors: how many were encoded.
    """

    codec: str
    spec: str
    head_dim: int
    inputs: str
    role: Role
    bits: float
    nmse: float
    vectors: int


@dataclass(frozen=True)
class Bar:
    """A condition that the codecs must meet.

    Attributes:
        name: of the condition.
        value: the measured error, or the ratio of Tessera's error to a baseline's.
        limit: the maximum of `value`; a ratio must be below it.
        bits: at which `value` was measured.
        most_bits: the maximum of `bits`.
        holds: whether the condition is met.
        sentence: the result in words.
    """

    name: str
    value: float
    limit: float
    bits: float
    most_bits: float
    holds: bool
    sentence: str


def gaussian(tokens: int, dim: int, random: torch.Generator) -> Tensor:
    """Draw independent normal numbers, (1, heads, tokens, dim)."""
    return torch.randn(1, HEADS, tokens, dim, generator=random)


def heavy_tailed(tokens: int, dim: int, random: torch.Generator) -> Tensor:
    """Draw independent numbers of unit variance from Student's t distribution with four degrees of freedom."""
    chi2 = torch.randn(1, HEADS, tokens, dim, 4, generator=random).square().sum(-1)
    return gaussian(tokens, dim, random) * (4 / chi2).sqrt() / 2**0.5


def giant_keys(tokens: int, dim: int, random: torch.Generator) -> Tensor:
    """Draw keys of unit variance in which four channels are 80 to 280 times as large, see `giant_channels`."""
    x = gaussian(tokens, dim, random)
    constant, varying = giant_channels(dim)
    size = 80 + 200 * torch.rand(1, HEADS, 1, 4, generator=random)
    x[..., constant] += size[..., :2]
    x[..., varying] *= size[..., 2:]
    return x


def giant_channels(dim: int) -> tuple[list[int], list[int]]:
    """Return the channels of `giant_keys` with a giant constant mean, and those with a giant standard deviation."""
    return [dim // 7, dim // 2], [dim // 3, dim - 3]


#: For each kind of input: the function that draws it, and the role that it is encoded in.
INPUTS: dict[str, tuple[Callable[[int, int, torch.Generator], Tensor], Role]] = {
    "gaussian": (gaussian, "value"),
    "heavy-tailed": (heavy_tailed, "value"),
    "giant-keys": (giant_keys, "key"),
}


def error(x: Tensor, approximation: Tensor, inputs: str) -> float:
    """Return the error defined in the module's docstring."""
    squares = (x - approximation).double().square()
    if inputs == "giant-keys":
        return float((squares.mean((0, 2)) / x.double().var((0, 2), correction=0)).mean())
    return float(squares.sum() / x.double().square().sum())


def specs(inputs: str, quick: bool) -> list[tuple[str, str]]:
    """Return every (family, spec) that is measured on these inputs."""
    chosen = [(family, spec) for family, members in FAMILIES.items() for spec in members]
    chosen += [("HQMQ, Tessera, a part left out", spec) for spec in VARIANTS.get(inputs, ())]
    return [(family, spec) for family, spec in chosen if not (quick and spec in SLOW)]


def measure(inputs: list[str], quick: bool, seed: int, progress: Progress) -> list[Row]:
    """Encode and decode with every codec and measure the errors."""
    tokens = QUICK_TOKENS if quick else TOKENS
    work = [(kind, dim, family, spec) for kind in inputs for dim in HEAD_DIMS for family, spec in specs(kind, quick)]
    task = progress.add_task("codecs", total=len(work))
    rows = []
    for kind, dim, family, spec in work:
        progress.update(task, description=f"{spec}, {kind}, head_dim {dim}")
        draw, role = INPUTS[kind]
        x = draw(tokens, dim, torch.Generator().manual_seed(seed))
        packed = codecs.get(spec).encode(x, role)
        nmse = error(x, packed.decode(), kind)
        rows.append(Row(family, spec, dim, kind, role, packed.bits_per_element, nmse, HEADS * tokens))
        progress.advance(task)
    return rows


def bars(rows: list[Row]) -> list[Bar]:
    """Check all bars for which the rows suffice."""
    found = []
    for spec, limit, most_bits in LIMITS:
        for row in rows:
            if (row.spec, row.inputs, row.head_dim) == (spec, "gaussian", 128):
                holds = row.nmse <= limit and row.bits <= most_bits
                sentence = (
                    f"{spec} on Gaussian vectors of 128: {row.nmse:.5f} at {row.bits:.4f} bits, which is "
                    f"{'within' if holds else 'NOT within'} {limit:.4f} at {most_bits} bits."
                )
                name = f"{spec}, error at no more than {most_bits} bits"
                found.append(Bar(name, row.nmse, limit, row.bits, most_bits, holds, sentence))
    for kind, dim in dict.fromkeys((row.inputs, row.head_dim) for row in rows):
        found.append(_against_baselines([row for row in rows if (row.inputs, row.head_dim) == (kind, dim)]))
    return found


def _against_baselines(rows: list[Row]) -> Bar:
    """Return the largest ratio of Tessera's error to a baseline's in `RANGE`, on one kind of input."""
    kind, dim = rows[0].inputs, rows[0].head_dim
    worst: tuple[float, Row, Row | None] | None = None
    count = lost = 0
    for baseline in rows:
        if baseline.codec in BASELINES and RANGE[0] <= baseline.bits <= RANGE[1]:
            rivals = [row for row in rows if row.spec in OURS and row.bits <= baseline.bits]
            best = min(rivals, key=lambda row: row.nmse, default=None)
            ratio = best.nmse / baseline.nmse if best else float("inf")
            count, lost = count + 1, lost + (ratio >= 1)
            if worst is None or ratio > worst[0]:
                worst = ratio, baseline, best
    assert worst is not None, "no baseline has bits in the range"
    ratio, baseline, best = worst
    ours = f"{best.spec} with {best.nmse:.5f} at {best.bits:.4f}" if best else "nothing of hqmq has so few bits"
    verdict = f"less than each of {count}" if not lost else f"NOT less than {lost} of {count}"
    sentence = (
        f"hqmq errs {verdict} baselines of {RANGE[0]:g} to {RANGE[1]:g} bits, at no more bits than they have, on {kind} "
        f"vectors of {dim}; closest is {baseline.spec} with {baseline.nmse:.5f} at {baseline.bits:.4f}: {ours}."
    )
    name = f"hqmq's error over a baseline's at no more bits, {kind}, head_dim {dim}"
    return Bar(name, ratio, 1.0, best.bits if best else baseline.bits, baseline.bits, not lost, sentence)


def show(rows: list[Row], console: Console) -> None:
    """Print one table: a row for each codec, columns for each kind of input and head_dim."""
    columns = list(dict.fromkeys((row.inputs, row.head_dim) for row in rows))
    table = Table(title="True bits per element and normalised mean squared error; lower is better")
    table.add_column("codec")
    table.add_column("spec", no_wrap=True)
    for kind, dim in columns:
        table.add_column(f"{kind} {dim}\nbits · error", justify="right", no_wrap=True)
    cells = {(row.spec, row.inputs, row.head_dim): f"{row.bits:.3f} · {row.nmse:.5f}" for row in rows}
    family = ""
    for spec, codec in dict.fromkeys((row.spec, row.codec) for row in rows):
        if family and codec != family:
            table.add_section()
        table.add_row("" if codec == family else codec, spec, *(cells.get((spec, *column), "") for column in columns))
        family = codec
    console.print(table)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULT, help="file for the result (docs/results/codec_error.json)")
    parser.add_argument("--inputs", nargs="+", choices=tuple(INPUTS), default=tuple(INPUTS), help="which inputs (all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs (0)")
    parser.add_argument("--quick", action="store_true", help=f"fewer vectors, and without {', '.join(SLOW)}")
    options = parser.parse_args()

    with Progress(console=Console(stderr=True), transient=True) as progress:
        rows = measure(list(options.inputs), options.quick, options.seed, progress)
    judged = bars(rows)
    # A table cut to the width of a narrow terminal would lose figures; output to a file has no width to respect.
    console = Console() if Console().is_terminal else Console(width=200)
    show(rows, console)
    for bar in judged:
        console.print(bar.sentence, soft_wrap=True, highlight=False)
    result = {
        "seed": options.seed,
        "versions": environment(),
        "rows": [asdict(row) for row in rows],
        "bars": [asdict(bar) for bar in judged],
    }
    with atomic_path(options.json) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
