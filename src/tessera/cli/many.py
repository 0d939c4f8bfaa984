"""Options that take all words up to the next option, as in ``--specs dense q4_0``, or one word each time."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand


class ManyValues(TyperCommand):
    """A command without arguments of its own, whose repeatable options may be given several values at once."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the name of a repeatable option before each of its values, which is what click understands."""
        repeatable = {name for p in self.params if getattr(p, "multiple", False) for name in p.opts}
        expanded: list[str] = []
        current = ""  # the repeatable option whose values these may be
        for word in args:
            if word.startswith("-"):
                current = word if word in repeatable else ""
            elif current and expanded[-1] != current:
                expanded.append(current)
            expanded.append(word)
        return super().parse_args(ctx, expanded)
