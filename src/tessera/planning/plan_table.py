"""The table of a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tessera.evaluation.table import size
from tessera.planning.choose import Plan, PlanRow
from tessera.planning.measured import source

if TYPE_CHECKING:
    from rich.table import Table


def header(plan: Plan) -> tuple[str, ...]:
    """Names of the columns."""
    step = "read a token" if plan.batch == 1 else f"read a step of {plan.batch} tokens"
    return "cache", "bytes", "fits", "KL", "tokens kept", "context in budget", step, *(("ms",) if plan.bandwidth else ())


def cells(row: PlanRow) -> tuple[str, ...]:
    """A row under `header`."""
    return (
        row.spec,
        size(row.nbytes),
        "yes" if row.fits else "no",
        "" if row.kl is None else f"{row.kl:.4f}",
        f"{row.kept:,}",
        "any" if row.reach is None else f"{row.reach:,}",
        size(row.read),
        *(() if row.seconds is None else (f"{1000 * row.seconds:.1f}",)),
    )


def caption(plan: Plan, name: str) -> str:
    """Describe the table."""
    rows = "" if plan.batch == 1 else f", {plan.batch} rows"
    rate = f" ms: to read them at {_rate(plan.bandwidth)}, the weights not counted." if plan.bandwidth else ""
    longer = plan.made_for is not None and plan.context > plan.made_for
    warning = f" The model was made for {plan.made_for:,} tokens only." if longer else ""
    return (
        f"{name}: {plan.context:,} tokens{rows} in {plan.dtype}, a budget of {size(plan.budget)} for the cache. "
        f"KL: of the codec, measured on {source()}; none where tokens are dropped.{rate}{warning}"
    )


def advice(plan: Plan) -> str:
    """Recommend a cache in one line."""
    if plan.spec is None:
        least = min(plan.rows, key=lambda row: row.nbytes)
        return f"No candidate fits in {size(plan.budget)}; the smallest, {least.spec!r}, needs {size(least.nbytes)}."
    best = plan.rows[0]
    forgets = f"; it forgets all but {best.kept:,} of the {plan.context:,} tokens" if best.kept < plan.context else ""
    return f'Use: tessera.Cache("{plan.spec}", model){forgets}'


def table(plan: Plan) -> Table:
    """The plan as a table for a terminal."""
    from rich.table import Table

    made = Table()
    for number, column in enumerate(header(plan)):
        made.add_column(column, justify="right" if number else "left", no_wrap=not number)
    for row in plan.rows:
        made.add_row(*cells(row), style="" if row.fits else "dim")
    return made


def _rate(rate: int) -> str:
    return f"{rate / 1e9:,.4g} GB/s"
