"""Training and measurement of a small `tessera.lab.models.backbones.Backbone` on a task that requires a memory."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from tessera.lab.models.backbones import Backbone, BackboneConfig, build_backbone, parameters
from tessera.lab.tasks.associative_recall import accuracy
from tessera.lab.training.checkpoints import claim
from tessera.lab.training.loop import train
from tessera.lab.training.schedule import FORWARD_TOKENS, LoopConfig, Phase

MEASURED = 512
"""Number of sequences that a trained model is measured on, always the same; with other delays a quarter of them."""


class Task(Protocol):
    """The interface of tasks. A task with a method `lesson`, like `sample`, is trained on that."""

    @property
    def features(self) -> int:
        """Number of features of a token."""

    @property
    def classes(self) -> int:
        """Number of possible answers."""

    @property
    def frame(self) -> int:
        """Tokens of a frame."""

    @property
    def length(self) -> int:
        """Tokens of a sequence."""

    @property
    def ceiling(self) -> float:
        """Accuracy of the best answer from everything seen so far."""

    @property
    def stateless(self) -> float:
        """Accuracy of the best answer from the current frame."""

    @property
    def chance(self) -> float:
        """Accuracy of the best answer from nothing."""

    def sample(self, batch: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw tokens, (batch, length, features), and targets, (batch, length)."""


@dataclass(frozen=True)
class DiagnosticConfig:
    """The configuration of a run: task, model and training."""

    task: Any
    """The task, from `tessera.lab.tasks`; see `Task`."""
    backbone: BackboneConfig
    """The model, with the task's features, classes and frame."""
    steps: int = 300
    """Optimizer steps."""
    batch: int = 32
    """Number of sequences per step."""
    rate: float = 1.0
    """Factor of the learning rates of long runs."""
    seed: int = 0
    """The seed of the model and of the sequences."""
    delays: tuple[int, ...] = ()
    """Further delays of the task that the trained model is measured with.

    Training then has every delay up to the task's, because with one long delay alone the model gets no signal at first.
    """

    def __post_init__(self) -> None:
        for name in ("features", "classes", "frame"):
            own, asked = getattr(self.backbone, name), getattr(self.task, name)
            if own != asked:
                raise ValueError(f"the backbone has {name} {own}, and the task {asked}")
        self.loop()

    def loop(self) -> LoopConfig:
        """Return the training schedule."""
        return LoopConfig(
            phases=(Phase(1.0, self.task.length, self.batch),),
            steps=self.steps,
            muon_lr=3e-3 * self.rate,
            adamw_lr=2e-3 * self.rate,
            gate_lr=2e-2 * self.rate,
            warmup_steps=min(50, self.steps // 4),
            mixed_precision="no",
            seed=self.seed,
        )


@torch.no_grad()
def measure(model: Backbone, task: Task, count: int | None = None) -> float:
    """Measure the accuracy of a model on so many sequences; None: `MEASURED`."""
    count = count or MEASURED
    device = model.head.weight.device
    right, part = 0.0, max(1, min(count, FORWARD_TOKENS // task.length))
    x, targets = task.sample(count, Generator().manual_seed(10**6))
    for tokens, wanted in zip(x.split(part), targets.split(part), strict=True):
        right += accuracy(model(tokens.to(device)).logits, wanted.to(device)) * len(tokens)
    return right / count


def train_diagnostic(config: DiagnosticConfig, out: Path, *, show: bool = True) -> tuple[Backbone, dict[str, Any]]:
    """Train a model in ``out``, or go on, and measure it.

    Returns:
        The model, and ``accuracy``, ``chance``, ``stateless``, ``ceiling``, ``parameters``, ``gates`` (of a memory, in each
        layer), ``seconds``; with delays ``by_delay``, the accuracy at each.

    Raises:
        ValueError: if ``out`` holds a run of another recipe.
    """
    task = config.task
    claim(out, {"task": type(task).__name__, **asdict(config)})
    model = build_backbone(config.backbone, config.seed)

    def sample(seed: tuple[int, ...], batch: int, _: int) -> tuple[Tensor, Tensor]:
        generator, drawn = Generator().manual_seed(hash(seed) % (1 << 31)), task
        if config.delays:
            drawn = replace(task, delay=int(torch.randint(task.delay + 1, (), generator=generator)))
        tokens, targets = getattr(drawn, "lesson", drawn.sample)(batch, generator)
        return tokens, targets

    began = time.monotonic()
    train(model, sample, config.loop(), out, show=show)
    model.eval()
    by_delay = {str(delay): measure(model, replace(task, delay=delay), max(1, MEASURED // 4)) for delay in config.delays}
    return model, {
        "accuracy": measure(model, task),
        "chance": task.chance,
        "stateless": task.stateless,
        "ceiling": task.ceiling,
        "parameters": parameters(model),
        "gates": [float(gate) for gate in model.gates()],
        "seconds": time.monotonic() - began,
        **({"by_delay": by_delay} if by_delay else {}),
    }
