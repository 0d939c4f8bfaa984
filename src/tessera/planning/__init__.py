"""The planner: exact bytes of every candidate cache at a context, from a model's config only, ranked by measured errors."""

from __future__ import annotations

from tessera.planning.choose import Plan, PlanRow, plan
from tessera.planning.sizes import parse_bytes, parse_rate, parse_tokens

__all__ = ["Plan", "PlanRow", "parse_bytes", "parse_rate", "parse_tokens", "plan"]
