"""After any sequence of calls and changes, a cache's results agree with the definition."""

from __future__ import annotations

import os

import pytest
import torch
from cache_machine import KINDS, CacheMachine, Kind, model_of
from cache_models import tokens
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

import tessera

#: Other seeds try other sequences: TESSERA_TEST_SEED=1 pytest tests/machine
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
def test_every_result_of_very_many_operations_is_what_the_definition_says(kind: Kind) -> None:
    """There are 20,000 operations in all, each followed by a call."""
    run(kind, -(-20_000 // len(KINDS) // 14), 14)


@pytest.mark.parametrize("spec", ["dense", "sink:2 + window:20", "sink:4 + hqmq:4 + recent:16"])
@torch.no_grad()
def test_a_mask_that_does_not_fit_is_refused_and_harms_nothing(spec: str) -> None:
    torch.manual_seed(0)
    model, ids = model_of("plain"), tokens(1, 120)
    cache, other = tessera.Cache(spec, model), tessera.Cache(spec, model)
    for one in (cache, other):
        model(ids[:, :100], past_key_values=one)
    # A window of 119 slots instead of 120.
    mask = torch.ones(1, 1, 20, 119, dtype=torch.bool).tril(99)
    with pytest.raises(ValueError, match="does not fit"):
        model(ids[:, 100:], attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == 100
    found, wanted = (model(ids[:, 100:], past_key_values=one).logits for one in (cache, other))
    assert torch.equal(found, wanted)
