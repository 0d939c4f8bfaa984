"""Concurrent generations on one model, each with its own cache, do not affect each other."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cache_machine import model_of
from cache_models import tokens
from torch import Tensor
from transformers import DynamicCache

import tessera

THREADS = 4
#: Specifications for each model; None: transformers' own cache.
SPECS: dict[str, tuple[str | None, ...]] = {
    "plain": (None, "dense", "sink:2 + window:20", "sink:4 + hqmq:4 + recent:16", "hqmq:3@128 + recent:16", "q4_0"),
    "sliding": ("dense", "sink:2 + kivi:4 + recent:8"),
    "tc": (None, "sink:2 + window:16 + tc", "dense"),
    "tc-rotary": (None, "sink:2 + window:16 + tc"),
    "tm": (None, "dense", "sink:2 + window:20", "sink:4 + hqmq:4 + recent:16"),
}


@contextmanager
def one_at_a_time(model: Any) -> Iterator[None]:
    """Switch threads within every attention module and every layer, as may happen at any time."""
    inside = [module for layer in model.model.layers for module in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    hooks = [module.register_forward_pre_hook(lambda *_: time.sleep(5e-4)) for module in inside]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def generate(model: Any, spec: str | None, ids: Tensor, meet: threading.Barrier | None = None) -> tuple[Tensor, list[Tensor]]:
    """Generate greedily; return the tokens, and the logits of every call. At `meet` threads wait for each other before a
    call."""
    cache = DynamicCache(config=model.config) if spec is None else tessera.Cache(spec, model)
    found, given = [], ids
    for _ in range(12):
        if meet is not None:
            meet.wait(timeout=60)
        with torch.no_grad():
            logits = model(given, past_key_values=cache).logits
        found.append(logits)
        given = logits[:, -1:].argmax(-1)
        ids = torch.cat((ids, given), 1)
    return ids, found


@pytest.mark.parametrize(("name", "spec"), [(name, spec) for name, specs in SPECS.items() for spec in specs])
def test_generations_at_once_are_what_each_is_alone(name: str, spec: str | None) -> None:
    torch.manual_seed(0)
    model = model_of(name)
    # Different lengths and numbers of rows, so that mixed-up tensors do not even fit.
    prompts = [tokens(rows, length) for rows, length in ((1, 90), (1, 90), (2, 70), (1, 133))]
    alone = [generate(model, spec, ids) for ids in prompts]
    together: list[Any] = [None] * THREADS
    meet = threading.Barrier(THREADS)

    def run(i: int) -> None:
        try:
            together[i] = generate(model, spec, prompts[i], meet)
        except Exception as error:
            together[i] = error
            meet.abort()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(THREADS)]
    with one_at_a_time(model):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    errors = [one for one in together if isinstance(one, Exception) and not isinstance(one, threading.BrokenBarrierError)]
    assert not errors, errors
    for (ids, logits), (wanted_ids, wanted) in zip(together, alone, strict=True):
        assert torch.equal(ids, wanted_ids)
        for found, right in zip(logits, wanted, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
