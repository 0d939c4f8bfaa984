"""Tables of caches' effects on each layer, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from tessera.evaluation.records import Comparison, LayerRow

#: Specifications side by side in one table.
BESIDE = 4


def layer_tables(comparison: Comparison) -> Iterator[Table]:
    """Tables for each protocol, a row a layer: KL of the rows of attention, and the error of what attention gives."""
    for protocol in dict.fromkeys(row.protocol for row in comparison.layers):
        own = {(row.layer, row.spec): row for row in comparison.layers if row.protocol == protocol}
        specs = list(dict.fromkeys(spec for _, spec in own))
        layers = sorted({layer for layer, _ in own})
        for first in range(0, len(specs), BESIDE):
            some = specs[first : first + BESIDE]
            title = f"{comparison.model}, {protocol}, layer by layer: KL of the rows of attention, error of what it gives"
            table = Table(title=title, title_justify="left", title_style="bold")
            table.add_column("layer", justify="right")
            for spec in some:
                table.add_column(spec, justify="right")
            for layer in layers:
                table.add_row(str(layer), *(_cell(own[layer, spec]) for spec in some))
            yield table


def _cell(row: LayerRow) -> str:
    return f"{'dropped' if row.kl is None else f'{row.kl:.5f}'}  {row.error:.2%}"
