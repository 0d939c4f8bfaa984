"""The recall task: its questions, the distance of answers, and the scores of guessing and of full knowledge."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.lab.tasks.associative_recall import IGNORED, Recall, accuracy


@settings(max_examples=30, deadline=None)
@given(pairs=st.integers(1, 20), rewrites=st.integers(0, 20), gap=st.integers(0, 40), queries=st.integers(1, 20))
def test_every_answer_is_the_latest_value_and_lies_beyond_the_gap(pairs: int, rewrites: int, gap: int, queries: int) -> None:
    task = Recall(pairs=pairs, rewrites=min(rewrites, pairs), gap=gap, queries=min(queries, pairs), keys=24, values=7)
    tokens, targets = task.sample(8)
    assert tokens.shape == targets.shape == (8, task.length)
    assert tokens.max() < task.vocabulary
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        places = [i for i, target in enumerate(wanted) if target != IGNORED]
        assert len(places) == task.asked
        assert len({row[i] for i in places}) == task.asked
        for i in places:
            written = [j for j in range(0, 2 * (pairs + task.rewrites), 2) if row[j] == row[i]]
            assert row[written[-1] + 1] == wanted[i]
            assert i - (written[-1] + 1) > gap


def test_the_same_seed_draws_the_same_sequences() -> None:
    task = Recall()
    first, again = (task.sample(4, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], task.sample(4, torch.Generator().manual_seed(6))[0])


def test_guessing_is_at_chance_and_knowing_at_the_ceiling() -> None:
    task = Recall(pairs=8, gap=4, values=16)
    tokens, targets = task.sample(2000)
    guess = torch.zeros(*tokens.shape, task.vocabulary)
    guess[..., task.keys] = 1
    assert accuracy(guess, targets) == pytest.approx(task.chance, abs=0.01)
    know = torch.nn.functional.one_hot(targets.clamp(min=0), task.vocabulary).float()
    assert accuracy(know, targets) == 1


def test_a_table_of_the_pairs_reaches_the_ceiling_from_the_tokens_alone() -> None:
    task = Recall(pairs=6, rewrites=3, gap=5)
    tokens, targets = task.sample(50)
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        table = {row[j]: row[j + 1] for j in range(0, 2 * 9, 2)}
        assert all(table[row[i]] == target for i, target in enumerate(wanted) if target != IGNORED)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pairs": 65}, "between 1 and the number of keys, 64; got 65"),
        ({"rewrites": 17}, "between 0 and the number of pairs, 16; got 17"),
        ({"queries": 0}, "between 1 and the number of pairs, 16; got 0"),
        ({"gap": -1}, "gap must not be negative"),
    ],
)
def test_tasks_that_cannot_be_are_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recall(**fields)
