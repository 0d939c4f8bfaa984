"""Training and measurement of a small `ViT` on a task of pictures or clips, from scratch."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from tessera.files import write_json
from tessera.lab.models.vit import ViT, ViTConfig
from tessera.lab.tasks.pictures import Pictures
from tessera.lab.training.checkpoints import claim
from tessera.lab.training.lm import forget
from tessera.lab.training.loop import IGNORED, Moment, train
from tessera.lab.training.schedule import LoopConfig, Phase
from tessera.lab.training.vision_plot import plot_vision

PART = 32
"""Number of pictures or clips that are measured at once."""


class Task(Protocol):
    """The interface of `Digits`, `MovingDigits` and `Clips`."""

    @property
    def pictures(self) -> Pictures:
        """The pictures or clips to draw from."""

    @property
    def patch(self) -> int:
        """Side of a patch."""

    @property
    def size(self) -> int:
        """Pixels along a side."""

    @property
    def chance(self) -> float:
        """Score of guessing."""

    @property
    def ceiling(self) -> float:
        """Score of the best answer."""

    @property
    def about(self) -> dict[str, Any]:
        """Return the task as a dictionary for JSON."""

    def sample(self, batch: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw pixels for training, and targets: labels, or pixels of patches; `IGNORED` where nothing is asked."""

    def test(self) -> tuple[Tensor, Tensor]:
        """Return held-out pixels and targets."""

    def score(self, output: Tensor, targets: Tensor) -> float:
        """Score the output of a model."""


@dataclass(frozen=True)
class VisionConfig:
    """The configuration of a run: model and training."""

    attention: str = "all"
    """See `ViTConfig`."""
    memory: dict[str, Any] | None = None
    """Fields of `TensorMemoryConfig`."""
    hidden: int = 64
    """Width of the residual stream."""
    layers: int = 2
    """Layers."""
    heads: int = 4
    """Heads."""
    positions: str = "learned"
    """See `ViTConfig`."""
    batch: int = 64
    """Number of pictures or clips per step."""
    micro_batch: int | None = None
    """Number of them per forward pass; see `Phase`."""
    steps: int = 300
    """Optimizer steps."""
    seed: int = 0
    """The seed of the model and of the data."""
    precision: str = "no"
    """"bf16" or "no"."""
    tensorboard: bool = False
    """See `LoopConfig`."""

    def __post_init__(self) -> None:
        for name in ("hidden", "layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        self.loop(1)

    def loop(self, tokens: int) -> LoopConfig:
        """Return the training schedule, for pictures or clips of so many patches."""
        return LoopConfig(
            phases=(Phase(1.0, tokens, self.batch, self.micro_batch),),
            steps=self.steps,
            # Three times the rate of small language models: otherwise hidden patches are hardly learned in 300 steps.
            muon_lr=9e-3,
            adamw_lr=6e-3,
            warmup_steps=min(50, 1 + self.steps // 10),
            mixed_precision=self.precision,
            seed=self.seed,
            tensorboard=self.tensorboard,
        )


def build_vision(config: VisionConfig, task: Task) -> ViT:
    """Return the untrained model, the same for the same seed."""
    about = task.about
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed)
        return ViT(
            ViTConfig(
                image_size=task.size,
                patch_size=task.patch,
                num_channels=task.pictures.pixels.shape[-3],
                hidden_size=config.hidden,
                intermediate_size=2 * config.hidden,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                classes=0 if about.get("ask") == "pixels" else len(task.pictures.names),
                positions=config.positions,
                attention=config.attention,
                memory=config.memory,
            )
        )


def answer(model: Any, pixels: Tensor, targets: Tensor) -> Tensor:
    """Run a model; pixels that are asked for are hidden from it."""
    masked = {"masked": (targets != IGNORED).any(-1)} if targets.is_floating_point() else {}
    logits: Tensor = model(pixels, **masked).logits
    return logits


def loss(model: nn.Module, pixels: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean cross-entropy of labels, or squared error of pixels, over all targets."""
    output, asked = answer(model, pixels, targets).float(), targets != IGNORED
    if targets.is_floating_point():
        return (output - targets)[asked].square().mean()
    total = cross_entropy(output.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / asked.sum().clamp(min=1)


@torch.no_grad()
def held_out_answers(model: Any, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """Return held-out pixels, targets, and the model's output, on the CPU."""
    pixels, targets = task.test()
    parts = zip(pixels.split(PART), targets.split(PART), strict=True)
    return pixels, targets, torch.cat([answer(model, x.to(model.device), y.to(model.device)).float().cpu() for x, y in parts])


def train_vision(
    config: VisionConfig,
    task: Task,
    out: Path,
    name: str,
    *,
    resume: bool = True,
    stop_at: int | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Train a model in ``out`` and measure it on what is held out; the result goes to ``{name}.json`` and ``{name}.png``.

    Args:
        config: the model and the schedule.
        task: `Digits`, `MovingDigits` or `Clips`.
        out: the run's directory, with the model in ``model``.
        name: name of the result, "image" or "video".
        resume: go on with the run found there; otherwise it is deleted first.
        stop_at: stop after this many steps, as an interruption would.
        show: draw a bar.

    Returns:
        ``score``, ``chance``, ``ceiling``, ``parameters``, ``seconds``; of a run that was stopped ``seconds`` alone.

    Raises:
        ValueError: if ``out`` holds a run of another recipe.
    """
    model = build_vision(config, task)
    about = task.about
    processes = PartialState(cpu=not torch.cuda.is_available())
    with processes.main_process_first():
        if processes.is_main_process and not resume:
            forget(out)
        claim(out, {**asdict(replace(config, steps=1)), **about})
    found: dict[str, Any] = {}

    def sample(seed: tuple[int, ...], batch: int, _: int) -> tuple[Tensor, Tensor]:
        pixels, targets = task.sample(batch, Generator().manual_seed(hash(seed) % (1 << 31)))
        # The loop splits targets along their second axis.
        return pixels, targets.unsqueeze(1) if targets.ndim == 1 else targets

    def at_end(moment: Moment) -> dict[str, float]:
        trained: Any = moment.model
        trained.save_pretrained(out / "model")
        if moment.progress < 1:
            return {}
        pixels, targets, said = held_out_answers(trained, task)
        found["score"] = task.score(said, targets)
        plot_vision(out / "log.jsonl", out / f"{name}.png", task, pixels, targets, said)
        return {"held_out_score": found["score"]}

    began = time.monotonic()
    loop = config.loop(model.config.patches * about.get("frames", 1))
    train(model, sample, loop, out, resume=resume, stop_at=stop_at, loss=loss, on_checkpoint=at_end, show=show)
    if found:
        found.update(chance=task.chance, ceiling=task.ceiling, parameters=sum(p.numel() for p in model.parameters()))
    found["seconds"] = time.monotonic() - began
    if "score" in found:
        write_json(out / f"{name}.json", {**about, **asdict(config), **found})
    return found
