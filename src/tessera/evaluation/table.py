"""A comparison as a table for the terminal, as Markdown for the docs, and as one sentence of advice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from tessera.evaluation.first_token import SINK, SINKS, lacks_sinks, with_sinks
from tessera.evaluation.records import Comparison, Row
from tessera.evaluation.standard_errors import NEIGHBOURS
from tessera.tiers.per_layer import parse

COLUMNS = ("cache", "perplexity", "Δ", "KL", "top-1", "bits", "bits in all", "cache size", "smaller", "tokens/s")
#: What a narrow terminal does without, first to last.
DISPENSABLE = ("tokens/s", "bits", "bits in all", "top-1", "smaller", "perplexity")
#: Fewest characters in a line of a spec.
LEAST = 20
#: Maximum number of pairs of one protocol that are printed; the record has all.
SHOWN_PAIRS = 3
#: Largest increase of perplexity of a cache that is still recommended.
TOLERATED = 0.005
#: Relative difference of bytes that is ignored between caches.
ABOUT = 0.02
_MEANING = {
    "streaming": "streaming: chunks of {chunk} tokens, everything older read from the cache",
    "paper": "paper: every key and value quantised before it is attended to, {exact}",
}


def size(count: float) -> str:
    """Bytes in the largest unit that leaves a number over one."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def cells(row: Row) -> tuple[str, ...]:
    """Format one row in the order of `COLUMNS`."""
    exact = row.spec == "dense"
    return (
        row.spec,
        f"{row.perplexity:.3f}",
        "" if exact else f"{row.delta:+.2%} ± {row.delta_error:.2%}",
        "" if exact else f"{row.kl:.5f}" + ("" if row.kl_error is None else f" ± {row.kl_error:.5f}"),
        "" if exact else f"{row.top1:.1%}",
        f"{row.codec_bits:.3f}",
        f"{row.bits:.2f}",
        size(row.nbytes),
        f"{row.compression:.2f}x",
        f"{row.tokens_per_second:,.0f}",
    )


def tables(comparison: Comparison, named: bool = False, width: int | None = None) -> list[Table]:
    """A rich table for each protocol.

    Args:
        comparison: what was measured.
        named: the title begins with the model, because there are several.
        width: of the terminal, in characters: columns that do not fit are left out, and named below the table. None: as wide as
            need be.
    """
    made = []
    for protocol in dict.fromkeys(row.protocol for row in comparison.rows):
        rows = [row for row in comparison.rows if row.protocol == protocol]
        whole = [dict(zip(COLUMNS, cells(row), strict=True)) for row in rows]
        shown = _fitting(whole, width)
        absent = [column for column in COLUMNS if column not in shown]
        title = (f"{comparison.model}, " if named else "") + _meaning(comparison, protocol)
        note = f"no room for: {', '.join(absent)} (all are in the saved file)" if absent else None
        table = Table(title=title, title_justify="left", title_style="bold", caption=note, caption_justify="left")
        for column in shown:
            # A long spec goes on in a second line, so that no number is cut.
            first = column == "cache"
            table.add_column(
                column, justify="left" if first else "right", no_wrap=not first, min_width=LEAST if first else None
            )
        for row, cell in zip(rows, whole, strict=True):
            table.add_row(*(cell[column] for column in shown), style="dim" if row.spec == "dense" else None)
        made.append(table)
    return made


def _fitting(rows: Sequence[Mapping[str, str]], width: int | None) -> list[str]:
    """The columns that fit a width, beside at least `LEAST` characters of the spec."""
    shown = list(COLUMNS)
    needs = {column: max(len(column), *(len(row[column]) for row in rows)) for column in shown} | {"cache": LEAST}
    for column in DISPENSABLE:
        # A border or a space on either side of each, and a border at the end.
        if width is not None and sum(needs[name] + 3 for name in shown) + 1 > width:
            shown.remove(column)
    return shown


def _meaning(comparison: Comparison, protocol: str) -> str:
    """Describe a protocol in one line."""
    sinks = any(parse(row.spec).sink for row in comparison.rows if row.protocol == protocol)
    return _MEANING[protocol].format(
        chunk=comparison.chunk, exact="nothing exact but the sinks of those that have them" if sinks else "nothing exact"
    )


def caption(comparison: Comparison) -> str:
    """Describe the measurement, its model and text, and the columns."""
    skipped = f" without its first {comparison.skip:,} tokens" if comparison.skip else ""
    errors = "" if all(row.kl_error is None for row in comparison.rows) else f"; errors over blocks of {NEIGHBOURS} tokens"
    return (
        f"{comparison.model} ({comparison.dtype}) on {comparison.text}{skipped}: {comparison.tokens:,} tokens in windows of "
        f"{comparison.context:,}. Δ: perplexity against the exact cache ± its standard error. KL, top-1: against the exact "
        f"model's predictions{errors}. bits: kept per element by the codec, everything counted; in all: with the exact tiers."
    )


def differences(comparison: Comparison) -> list[str]:
    """A line for every two specifications, paired token by token, if they are few enough to be read: `SHOWN_PAIRS`."""
    lines = []
    for protocol in dict.fromkeys(pair.protocol for pair in comparison.pairs):
        own = [pair for pair in comparison.pairs if pair.protocol == protocol]
        if len(own) <= SHOWN_PAIRS:
            lines += [
                f"{protocol}, {pair.spec} less {pair.other}: KL {pair.kl:+.5f} ± {pair.kl_error:.5f}, "
                f"log-likelihood {-pair.nll:+.5f} ± {pair.nll_error:.5f} nats"
                for pair in own
            ]
    return lines


def without_sinks(comparison: Comparison) -> list[str]:
    """Write a line about the cost for each cache without sinks, on a model whose first token is one."""
    if comparison.first_token is None or comparison.first_token <= SINK:
        return []
    kl = {(row.protocol, row.spec): row.kl for row in comparison.rows}
    specs = [row.spec for row in comparison.rows]
    return [
        f"{protocol}, {spec}: without sinks KL {found:.5f}, with sink:{SINKS} {kl[protocol, other]:.5f}; the first token draws "
        f"up to {comparison.first_token:.0%} of a layer's attention"
        for (protocol, spec), found in kl.items()
        if lacks_sinks(spec) and (protocol, other := with_sinks(spec, specs)) in kl
    ]


def markdown(comparison: Comparison, protocol: str | None = None) -> str:
    """The tables as Markdown: of one protocol, or of all."""
    parts = [caption(comparison)]
    for name in dict.fromkeys(row.protocol for row in comparison.rows):
        if protocol in (None, name):
            rows = [cells(row) for row in comparison.rows if row.protocol == name]
            parts.append(f"**{_meaning(comparison, name)}**")
            parts.append(markdown_table(COLUMNS, [(f"`{spec}`", *rest) for spec, *rest in rows]))
    return "\n\n".join(parts)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    lines = [_line(header), "| --- |" + " ---: |" * (len(header) - 1), *map(_line, rows)]
    return "\n".join(lines)


def _line(cells_of_row: Sequence[str]) -> str:
    return "| " + " | ".join(cells_of_row) + " |"


def best(comparison: Comparison) -> Row | None:
    """The cache of least KL among the smallest that cost at most `TOLERATED` perplexity as generation uses it, or None.

    A few bytes more, `ABOUT` of the smallest, count as no difference.
    """
    rows = [row for row in comparison.rows if row.protocol == "streaming" and row.compression > 1]
    good = [row for row in rows if row.delta <= TOLERATED]
    most = (1 + ABOUT) * min((row.nbytes for row in good), default=0)
    return min((row for row in good if row.nbytes <= most), key=lambda row: row.kl, default=None)


def advice(comparison: Comparison) -> str:
    """Recommend what to run next, in one sentence."""
    if all(row.protocol != "streaming" for row in comparison.rows):
        return "What generation would lose, which reads newer tokens exactly, is measured with --protocol streaming."
    row = best(comparison)
    if row is None:
        return f"No cache here stayed within {TOLERATED:.1%} of the exact one's perplexity; try 'hqmq:5', or a longer 'recent'."
    return (
        f'On your own model: model.generate(**inputs, past_key_values=tessera.Cache("{row.spec}", model)) - here '
        f"{row.compression:.1f}x smaller at {row.delta:+.2%} perplexity - or measure it first with: "
        "tessera compare --model YOUR_MODEL --text YOUR_TEXT"
    )
