"""Start vLLM engines in this process, and read their answers."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import pytest
import torch

pytest.importorskip("vllm")

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.v1.attention import selector

from tessera.codecs.channel_stats import KeyStats

SPEC = "sink:4 + hqmq:4"


@dataclass
class Answer:
    """An engine's answer to one prompt.

    Attributes:
        tokens: generated tokens.
        shared: number of prompt tokens that were found in the pool.
        logprobs: log-probabilities of the prompt's tokens from the second on, and of the generated tokens.
    """

    tokens: list[int]
    shared: int
    logprobs: torch.Tensor


@contextmanager
def engine(model: Any, spec: str | None = SPEC, *, apart: bool = False, **options: Any) -> Iterator[LLM]:
    """Start an engine, with vLLM's own cache if there is no specification.

    It runs in this process, where it starts in seconds, or in separate processes, as in production.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(apart))
    usual = {
        "dtype": "float32",
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 4096,
        "kv_cache_memory_bytes": 1 << 26,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    }
    if spec is not None:
        usual["additional_config"] = {"tessera": spec}
    # vLLM caches the choice of backend in a process.
    selector._cached_get_attn_backend.cache_clear()
    llm = None
    try:
        llm = LLM(model=str(model), **{**usual, **options})
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        if not apart:
            cleanup_dist_env_and_memory()
        gc.collect()


def random_stats(layers: int, kv_heads: int, dim: int) -> list[KeyStats]:
    """Draw random statistics: widths of a quarter to four, and every possible weight."""
    shape = (layers, 1, kv_heads, dim)
    sizes = 8 * torch.randint(17, 26, shape) + torch.randint(0, 8, shape)
    return [KeyStats(one.to(torch.uint8)) for one in sizes]


def ask(llm: LLM, prompts: Sequence[list[int]], tokens: int = 40, **options: Any) -> list[Answer]:
    """Return the greedy continuation of each prompt, in one batch."""
    params = SamplingParams(**{"temperature": 0, "max_tokens": tokens, "ignore_eos": True, **options})
    found = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    answers = []
    for one in found:
        written = one.outputs[0]
        given = [
            step[token].logprob for token, step in zip(one.prompt_token_ids, one.prompt_logprobs or [], strict=False) if step
        ]
        made = [step[token].logprob for token, step in zip(written.token_ids, written.logprobs or [], strict=False)]
        answers.append(Answer(list(written.token_ids), one.num_cached_tokens or 0, torch.tensor(given + made)))
    return answers


def counter(llm: LLM, name: str) -> float:
    """Return one of vLLM's metrics."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")
