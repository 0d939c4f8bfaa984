"""Assignment of a call's new tokens to groups: rows whose tokens come in the same slots share their tiers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from tessera.cache_layers.group import SequenceGroup
from tessera.cache_layers.masks import Runs
from tessera.cache_layers.new_tokens import NewTokens
from tessera.tiers.policy import RetentionPolicy


class Share(NamedTuple):
    """New tokens of a group.

    Attributes:
        group: the group that they will be stored in.
        tokens: which of the call's tokens they are.
        slots: slots of all tokens that the group will have then.
    """

    group: SequenceGroup
    tokens: Runs
    slots: Runs


class Shares(NamedTuple):
    """The result of `shares`.

    Attributes:
        shares: in the order in which they are to be stored.
        groups: all groups at the end of the call.
        waiting: rows that have seen only padding.
    """

    shares: list[Share]
    groups: list[SequenceGroup]
    waiting: list[int]


def shares(
    policy: RetentionPolicy,
    layer: int,
    groups: Sequence[SequenceGroup],
    waiting: Sequence[int],
    said: NewTokens | None,
    n: int,
    before: int,
) -> Shares:
    """Assign a call's tokens to groups; the given groups are not changed.

    Args:
        policy, layer: what new groups are made with.
        groups: the groups before the call.
        waiting: rows that have seen only padding.
        said: what the mask says; None: all of the tokens are real and no document begins.
        n: tokens of the call.
        before: slots before it.
    """
    if said is None and len(groups) == 1 and not waiting:
        # Shortcut for steps of rows without padding.
        tokens = Runs(((0, n),))
        return Shares([Share(groups[0], tokens, groups[0].slots.joined(tokens, before))], [groups[0]], [])
    found = Shares([], [], [])
    for group in (*groups, None):
        rows = waiting if group is None else group.rows
        alike: dict[tuple[bytes, tuple[int, ...]], list[int]] = {}
        for row in rows:
            alike.setdefault(_pattern(said, row, n, policy.by_document), []).append(row)
        for (real, begins), members in alike.items():
            own = group if group is None or len(members) == len(rows) else group.taken(members)
            tokens_before = 0 if own is None else own.before + own.slots.count
            for begin, tokens in _documents(Runs.marked(real), begins, own is None):
                if own is None or begin:
                    own = SequenceGroup(policy, layer, members, tokens_before)
                found.shares.append(Share(own, tokens, own.slots.joined(tokens, before)))
                tokens_before += tokens.count
            if own is None:
                found.waiting.extend(members)
            else:
                found.groups.append(own)
    found.waiting.sort()
    return found


def _pattern(said: NewTokens | None, row: int, n: int, by_document: bool) -> tuple[bytes, tuple[int, ...]]:
    if said is None:
        return b"\x01" * n, ()
    at = row if len(said.real) > 1 else 0
    return said.real[at], tuple(said.begins[at]) if by_document else ()


def _documents(tokens: Runs, begins: tuple[int, ...], new: bool) -> list[tuple[bool, Runs]]:
    """Split a row's tokens into documents, each with whether an earlier one precedes it. new: the row has had no token yet."""
    cuts = [cut for cut in map(tokens.before, begins) if cut or not new]
    found = [(number > 0, tokens.cut(a, b)) for number, (a, b) in enumerate(pairwise([0, *cuts, tokens.count]))]
    return [(begin, runs) for begin, runs in found if runs.runs]
