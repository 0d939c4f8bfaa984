"""Seeds of all tests, small models on disk, and marks of tests that need more than a CPU and a few seconds.

Every test has its own random inputs, the same in every run: its name determines the seed of the global generators. A failing
test prints its seed; TESSERA_TEST_SEED=N changes all seeds, also Hypothesis's examples. A helper that must draw the same
numbers twice within a test resets the seed: ``torch.manual_seed(torch.initial_seed())``.
"""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores, so more threads would only wait for each other. Subprocesses inherit the setting.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Triton reads this when it is imported, and other packages import it.
    os.environ["TRITON_INTERPRET"] = "1"


SEED = os.environ.get("TESSERA_TEST_SEED", "")

# Derandomised, Hypothesis tries the same examples in every run.
hypothesis.settings.register_profile("tessera", derandomize=not SEED, print_blob=True)
hypothesis.settings.load_profile("tessera")


def seed_of(test: str) -> int:
    """Return the seed of the test with this node id."""
    return zlib.crc32((SEED + test).encode())


class TorchRandom:
    """PyTorch's global generator for Hypothesis: every example starts with the test's seed."""

    def __init__(self) -> None:
        self.start = 0

    def seed(self, n: int) -> None:
        torch.manual_seed(self.start + n)

    def getstate(self) -> Any:
        return torch.get_rng_state()

    def setstate(self, state: Any) -> None:
        torch.set_rng_state(state)


TORCH = TorchRandom()
hypothesis.register_random(TORCH)  # type: ignore[arg-type]


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if SEED and config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(zlib.crc32(SEED.encode()))


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    seed = seed_of(request.node.nodeid)
    TORCH.start = seed
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: Any = yield
    if report.failed:
        report.sections.append((f"seed: {seed_of(item.nodeid)}", f"TESSERA_TEST_SEED={SEED or '(not set)'}"))
    return report


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = config.getoption("-m")
    no_gpu = pytest.mark.skip(reason="needs a CUDA device; run on one with: pytest -m gpu")
    slow = pytest.mark.skip(reason="takes minutes; run with: make test-slow")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if "slow" in item.keywords and "slow" not in chosen:
            item.add_marker(slow)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a Llama with random weights and a byte tokenizer in a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("small")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, **{letter: i + 1 for i, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a file with two thousand characters of text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {i}: the square of {i} is {i * i}\n" for i in range(70)), encoding="utf-8")
    return path
