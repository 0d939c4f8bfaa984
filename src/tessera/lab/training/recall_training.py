"""Training of a small `GPT` from scratch on `tessera.lab.tasks.associative_recall`, and its measurement."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Generator, Tensor

from tessera.files import write_json
from tessera.lab.models.small_gpt import GPT, GPTConfig, read_attention
from tessera.lab.tasks.associative_recall import Recall, accuracy
from tessera.lab.training.checkpoints import claim
from tessera.lab.training.lm import forget
from tessera.lab.training.loop import Moment, train
from tessera.lab.training.schedule import LoopConfig, Phase

GAPS = (0, 32, 64, 128, 256, 512)
"""Further gaps that a trained model is measured on."""

NEAR_PAIRS = 16
"""Maximum number of pairs at the start of training."""

MEASURED, PART = 256, 32
"""Number of sequences per measured gap, and number of them at once."""


@dataclass(frozen=True)
class RecallConfig:
    """The configuration of a run: task, model and training."""

    task: Recall = field(default_factory=lambda: Recall(gap=64))
    """The task: pairs, gap, rewritten keys."""
    attention: str = "window:16 + tc"
    """See `tessera.lab.models.small_gpt.GPTConfig`."""
    memory: dict[str, Any] | None = None
    """Fields of `TensorCacheConfig` for "tc"."""
    dim: int = 64
    """Width of a head."""
    layers: int = 2
    """Decoder layers."""
    heads: int = 2
    """Number of query heads, and of key heads."""
    hidden: int = 128
    """Width of the residual stream."""
    batch: int = 32
    """Number of sequences per step."""
    micro_batch: int | None = None
    """Number of sequences per forward pass; see `Phase`."""
    steps: int = 600
    """Optimizer steps."""
    near: float = 0.4
    """Share of the steps, the first ones, in which there is no gap and there are 16 pairs at most: a window reaches many of
    them, so that a model learns to tell keys apart before it has to look for them in its memory. Without this it often never
    does."""
    seed: int = 0
    """The seed of the model and of the sequences."""
    precision: str = "no"
    """"bf16" or "no"."""
    tensorboard: bool = False
    """See `LoopConfig`."""

    def __post_init__(self) -> None:
        for name in ("dim", "layers", "heads", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dim % 2:
            raise ValueError(f"dim must be even, for rotary positions; got {self.dim}")
        if not 0 <= self.near < 1:
            raise ValueError(f"near must lie in [0, 1), got {self.near}")
        read_attention(self.attention, self.memory)
        self.loop()

    def tasks(self) -> list[tuple[float, Recall]]:
        """The tasks of the curriculum, each with the progress until which it lasts; the last is the task itself."""
        task, pairs = self.task, min(self.task.pairs, NEAR_PAIRS)
        queries = None if task.queries is None else min(task.queries, pairs)
        near = replace(task, gap=0, pairs=pairs, rewrites=min(task.rewrites, pairs), queries=queries)
        return [*([(self.near, near)] if self.near and near.length < task.length else []), (1.0, task)]

    def loop(self) -> LoopConfig:
        """Return the training schedule."""
        return LoopConfig(
            phases=tuple(Phase(until, task.length, self.batch, self.micro_batch) for until, task in self.tasks()),
            steps=self.steps,
            muon_lr=1.5e-3,
            adamw_lr=8e-3,  # embeddings that distinguish keys are learned first, and slowly
            mixed_precision=self.precision,
            seed=self.seed,
            tensorboard=self.tensorboard,
        )


def state_bytes(config: RecallConfig, length: int) -> int:
    """Compute the bytes in float32 that all layers keep after `length` tokens."""
    limits, memory, segment = read_attention(config.attention, config.memory)
    pair, matrix = 2 * config.dim * 4, config.dim * config.dim * 4
    if segment is not None:
        kept = segment * pair + matrix + config.dim * 4
    elif limits is not None:
        kept = min(length, limits.window + limits.sink) * pair + (matrix if memory is not None else 0)
    else:
        kept = length * pair
    return config.layers * config.heads * kept


def build_recall(config: RecallConfig) -> GPT:
    """Return the untrained model, the same for the same seed."""
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed)
        return GPT(
            GPTConfig(
                attention=config.attention,
                memory=config.memory,
                vocab_size=config.task.vocabulary,
                hidden_size=config.hidden,
                intermediate_size=2 * config.hidden,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.heads,
                head_dim=config.dim,
                max_position_embeddings=max(2048, config.task.length),
                bos_token_id=None,
                eos_token_id=None,
            )
        )


@torch.no_grad()
def measure_recall(model: Any, task: Recall, gap: int) -> float:
    """Measure the accuracy of a model on `MEASURED` sequences with another gap, always the same ones."""
    tokens, targets = replace(task, gap=gap).sample(MEASURED, Generator().manual_seed(10**6 + gap))
    # In parts that fit a processor's caches.
    parts = zip(tokens.to(model.device).split(PART), targets.to(model.device).split(PART), strict=True)
    return sum(accuracy(model(ids).logits, wanted) for ids, wanted in parts) / (MEASURED // PART)


def train_recall(
    config: RecallConfig,
    out: Path,
    *,
    gaps: Sequence[int] = GAPS,
    resume: bool = True,
    stop_at: int | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Train a model in ``out`` and measure it; the result is written to ``out/recall.json``, the model to ``out/model``.

    Args:
        config: the task, the model, the schedule.
        out: the run's directory.
        gaps: to measure at, beside the task's own.
        resume: go on with the run found there; otherwise it is deleted first.
        stop_at: stop after this many steps, as an interruption would.
        show: draw a bar.

    Returns:
        ``accuracy`` at the gap of training, ``by_gap``, ``chance``, ``parameters``, ``state_bytes``, ``seconds``; of a run that
        was stopped ``seconds`` alone.

    Raises:
        ValueError: if ``out`` holds a run of another recipe.
    """
    task = config.task
    processes = PartialState(cpu=not torch.cuda.is_available())
    with processes.main_process_first():
        if processes.is_main_process and not resume:
            forget(out)
        claim(out, asdict(replace(config, steps=1)))
    model = build_recall(config)
    found: dict[str, Any] = {}

    tasks = {task.length: task for _, task in config.tasks()}

    def sample(seed: tuple[int, ...], batch: int, length: int) -> tuple[Tensor, Tensor]:
        generator = Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        return tasks[length - 1].sample(batch, generator)

    def at_end(moment: Moment) -> dict[str, float]:
        trained: Any = moment.model
        trained.save_pretrained(out / "model")
        if moment.progress < 1:
            return {}
        by_gap = {str(gap): measure_recall(trained, task, gap) for gap in sorted({*gaps, task.gap})}
        found.update(accuracy=by_gap[str(task.gap)], by_gap=by_gap)
        return {f"accuracy_gap_{gap}": value for gap, value in by_gap.items()}

    began = time.monotonic()
    train(model, sample, config.loop(), out, resume=resume, stop_at=stop_at, on_checkpoint=at_end, show=show)
    if found:
        found["chance"] = task.chance
        found["parameters"] = sum(p.numel() for p in model.parameters())
        found["state_bytes"] = state_bytes(config, task.length)
    found["seconds"] = time.monotonic() - began
    if "accuracy" in found:
        write_json(out / "recall.json", {**asdict(config), **found})
    return found
