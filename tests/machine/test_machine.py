"""Whatever sequence of calls and changes a cache has been through, each result is what the definition says."""

from __future__ import annotations

import os

import pytest
from cache_machine import KINDS, CacheMachine, Kind
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

#: Another one tries other sequences: TESSERA_TEST_SEED=1 pytest tests/machine
SEED = int(os.environ.get("TESSERA_TEST_SEED", "0"))


def run(kind: Kind, sequences: int, steps: int) -> None:
    print(f"TESSERA_TEST_SEED={SEED}")
    machine = seed(f"{SEED} {kind}")(type("CacheMachine", (CacheMachine,), {"kind": kind}))
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=sequences,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            print_blob=True,
            report_multiple_bugs=False,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_result_of_any_sequence_is_what_the_definition_says(kind: Kind) -> None:
    run(kind, -(-300 // len(KINDS)), 8)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_result_of_very_many_sequences_is_what_the_definition_says(kind: Kind) -> None:
    run(kind, -(-20_000 // len(KINDS)), 14)
