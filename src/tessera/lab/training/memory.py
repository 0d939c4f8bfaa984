"""Training of a memory that is attached to a frozen model.

The student is the model with its window and memory; by distillation the teacher is the same model with its dense cache, so
that no labels are needed (after AHN, arXiv 2510.07318). Only positions beyond the window count, since within it there is
nothing to learn. Windows may be drawn at random, so that the memory does not adapt to one length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from tessera.adapters import save_memory, tensor_cache
from tessera.cache import Cache
from tessera.lab.training.checkpoints import RunState, claim
from tessera.lab.training.loop import Moment, Sampler, train
from tessera.lab.training.schedule import LoopConfig

Objective = Literal["kl", "ce"]


@dataclass(frozen=True)
class MemoryTraining:
    """The objective of a memory's training."""

    objective: Objective = "kl"
    """"kl": the dense model's predictions. "ce": the text."""
    windows: tuple[int, ...] = ()
    """Windows from which each step draws one; none: the memory's own."""

    def __post_init__(self) -> None:
        if self.objective not in ("kl", "ce"):
            raise ValueError(f"objective must be 'kl' or 'ce', got {self.objective!r}")
        if any(window < 1 for window in self.windows):
            raise ValueError(f"windows need at least 1 token, got {self.windows}")


def set_window(model: nn.Module, window: int) -> None:
    """Set the window of the attached memory."""
    done = tensor_cache(model)
    done.config = replace(done.config, window=window)
    for layer in done.layers.values():
        layer.config = layer.memory.config = done.config


def train_memory(
    model: nn.Module,
    sample: Sampler,
    config: LoopConfig,
    out: Path,
    training: MemoryTraining | None = None,
    *,
    resume: bool = True,
    stop_at: int | None = None,
    on_checkpoint: Callable[[Moment], dict[str, float]] | None = None,
) -> RunState:
    """Train what `tessera.attach` added to `model`; the memory is written to ``out/memory.safetensors`` at every checkpoint.

    Args:
        model: with a memory attached, the rest frozen.
        sample: windows of text; see `Sampler`.
        config: the schedule.
        out: directory of the run.
        training: see `MemoryTraining`.
        resume, stop_at, on_checkpoint: see `train`.

    Raises:
        ValueError: if nothing is attached, sequences end within the window, or ``out`` holds a run of another recipe.
    """
    own = tensor_cache(model).config.window
    what = training or MemoryTraining()
    windows: Sequence[int] = what.windows or (own,)
    shortest = min(phase.sequence for phase in config.phases)
    if shortest <= max(windows):
        raise ValueError(f"sequences of {shortest} tokens end within a window of {max(windows)}; nothing lies behind it")

    processes = PartialState(cpu=not torch.cuda.is_available())
    with processes.main_process_first():
        if processes.is_main_process and not resume:
            (out / "recipe.json").unlink(missing_ok=True)
        budget = replace(config, steps=None, minutes=1.0)  # which may differ in a resumed run
        memory = tensor_cache(model).config.to_dict()
        claim(out, {"memory": memory, "training": asdict(what), "loop": asdict(budget)})

    def draw(seed: tuple[int, ...], batch: int, length: int) -> Any:
        # Drawn per step, not per part of its batch, so that parts, processes and resumed runs agree.
        set_window(model, windows[int(np.random.SeedSequence((*seed, 1)).generate_state(1)[0]) % len(windows)])
        return sample(seed, batch, length)

    def loss(student: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
        window = tensor_cache(student).config.window
        teacher: Tensor | None = None
        if what.objective == "kl":
            student.eval()
            with torch.no_grad():
                teacher = _logits(student(input_ids=ids, past_key_values=Cache("dense", student)))[:, window:]
            student.train()
        found = _logits(student(input_ids=ids))[:, window:]
        if teacher is None:
            return cross_entropy(found.flatten(0, 1), targets[:, window:].flatten())
        return kl_div(
            log_softmax(found, -1).flatten(0, 1), log_softmax(teacher, -1).flatten(0, 1), log_target=True, reduction="batchmean"
        )

    def keep(moment: Moment) -> dict[str, float]:
        set_window(moment.model, own)
        save_memory(moment.model, out / "memory.safetensors")
        return {} if on_checkpoint is None else on_checkpoint(moment)

    try:
        return train(model, draw, config, out, resume=resume, stop_at=stop_at, loss=loss, on_checkpoint=keep)
    finally:
        set_window(model, own)


def _logits(output: Any) -> Tensor:
    logits: Tensor = output.logits
    return logits.float()
