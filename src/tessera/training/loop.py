"""One training loop on `accelerate`, small enough to read: schedule, step, log, checkpoint, resume.

The schedule runs over *progress*, a number from 0 to 1: steps done over steps planned, or seconds trained over seconds
allowed. Counting seconds lets a run on a shared machine end when it must with its learning rate at zero.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tessera.associative.layer import is_gate

Sampler = Callable[[tuple[int, ...], int, int], "Tensor | tuple[Tensor, Tensor]"]
"""``(seed, batch, length) -> (batch, length)`` token ids, each to be predicted from those before it; or the ids and what is
to be predicted at each, -100 for nothing. By its arguments alone: otherwise a resumed run differs."""


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one shape of batch."""

    until: float
    """Progress at which it ends; the last phase ends at 1."""
    sequence: int
    """Tokens per sequence."""
    batch: int
    """Sequences per optimizer step, over all processes."""
    micro_batch: int
    """Sequences per forward pass; must divide ``batch`` by the number of processes."""

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise ValueError(f"until must lie in (0, 1], got {self.until}")
        if min(self.sequence, self.batch, self.micro_batch) < 1:
            raise ValueError("sequence, batch and micro_batch must be at least 1")
        if self.batch % self.micro_batch:
            raise ValueError(f"micro_batch {self.micro_batch} does not divide batch {self.batch}")


@dataclass(frozen=True)
class LoopConfig:
    """Settings of `train`. Exactly one of ``steps`` and ``minutes`` is the budget."""

    phases: tuple[Phase, ...]
    """In order of ``until``; the last must end at 1."""
    steps: int | None = None
    """Optimizer steps in all."""
    minutes: float | None = None
    """Minutes of training in all, pauses between resumed runs not counted."""
    muon_lr: float = 4e-3
    """Peak learning rate of the hidden matrices (Muon, updates scaled to AdamW's RMS)."""
    adamw_lr: float = 3e-3
    """Peak learning rate of everything else: embeddings, norms, biases."""
    gate_lr: float = 2e-2
    """Peak learning rate of gates, decays and write rates, which at the rate of weights would hardly move."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices; vectors have none."""
    warmup_steps: int = 50
    """Steps over which the learning rates rise from 0."""
    decay_from: float = 0.6
    """Progress at which the learning rates start to fall linearly to 0; before it they are constant."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.995
    """Decay per step of the averaged weights."""
    seed: int = 0
    """Seed of the data order."""
    mixed_precision: str = "bf16"
    """``bf16`` or ``no``."""
    compile: bool = False
    """Compile the model with `torch.compile`; needs a C++ compiler. A fifth faster here, after a minute per phase."""
    checkpoint_seconds: float = 240.0
    """Seconds between checkpoints."""
    log_every: int = 10
    """Steps per line of the log."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("give either steps or minutes")
        if (self.steps is not None and self.steps < 1) or (self.minutes is not None and self.minutes <= 0):
            raise ValueError("the budget must be positive")
        ends = [phase.until for phase in self.phases]
        if not ends or ends != sorted(ends) or ends[-1] != 1:
            raise ValueError(f"phases must end at increasing progress, the last at 1, got {ends}")
        if not 0 <= self.decay_from < 1:
            raise ValueError(f"decay_from must lie in [0, 1), got {self.decay_from}")

    def progress(self, step: int, seconds: float) -> float:
        """Return how much of the budget is spent, at most 1."""
        done = step / self.steps if self.steps is not None else seconds / (60 * (self.minutes or 1))
        return min(done, 1.0)

    def phase(self, progress: float) -> Phase:
        """Return the phase at this progress."""
        return next((phase for phase in self.phases if progress < phase.until), self.phases[-1])

    def rate(self, step: int, progress: float) -> float:
        """Return the learning rate as a fraction of its peak: linear warm-up, constant, linear decay to 0."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return warmup * min(1.0, (1 - progress) / (1 - self.decay_from))


@dataclass
class RunState:
    """What a run has done so far."""

    step: int = 0
    """Optimizer steps."""
    tokens: int = 0
    """Tokens predicted."""
    seconds: float = 0.0
    """Time spent training, checkpoints and evaluation included."""


@dataclass(frozen=True)
class Moment:
    """What hooks of `train` are given."""

    state: RunState
    """Steps, tokens and seconds so far."""
    progress: float
    """From 0 to 1; 1 is the end of the run."""
    model: nn.Module
    """The model in training, unwrapped."""
    average: dict[str, Tensor]
    """Averaged weights by parameter name, float32."""


def make_optimizers(model: nn.Module, config: LoopConfig) -> list[torch.optim.Optimizer]:
    """Return Muon for the hidden matrices and AdamW for the rest.

    Embeddings and the output layer are matrices too, but their rows are looked up one by one, so they take AdamW.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        tables.add(id(output.weight))
    gates = [p for name, p in model.named_parameters() if p.requires_grad and is_gate(name)]
    known = {id(p) for p in gates}
    parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    hidden = [p for p in parameters if p.ndim == 2 and id(p) not in tables]
    others = [p for p in parameters if p.ndim >= 2 and not (p.ndim == 2 and id(p) not in tables)]
    vectors = [p for p in parameters if p.ndim < 2]
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:
        optimizers.append(
            torch.optim.Muon(hidden, lr=config.muon_lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    groups: list[dict[str, Any]] = [
        {"params": others, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
        {"params": gates, "weight_decay": 0.0, "lr": config.gate_lr},
    ]
    groups = [group for group in groups if group["params"]]
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=config.adamw_lr, betas=(0.9, 0.98), eps=1e-8))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def average_gradients(model: nn.Module, accelerator: Accelerator) -> None:
    """Replace every gradient by its mean over the processes, in one reduction."""
    if accelerator.num_processes == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    mean = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), reduction="mean")
    for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


# --- checkpoints: safetensors and JSON, never pickle ------------------------------------------------------------------


def _checkpoints(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("step-*") if not path.name.endswith(".tmp"))


def save_checkpoint(
    directory: Path,
    state: RunState,
    model: nn.Module,
    average: dict[str, Tensor],
    optimizers: list[torch.optim.Optimizer],
    keep: int = 2,
) -> Path:
    """Write one checkpoint under ``directory``, whole or not at all, and delete all but the newest ``keep``.

    Returns:
        The checkpoint's directory, ``step-00001234``.
    """
    target = directory / f"step-{state.step:08d}"
    temporary = directory / f"{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for which, optimizer in enumerate(optimizers):
        for index, values in optimizer.state_dict()["state"].items():
            for name, value in values.items():
                place = tensors if isinstance(value, Tensor) else scalars
                place[f"{which}.{index}.{name}"] = value.contiguous() if isinstance(value, Tensor) else value
    weights = {name: value.detach().contiguous() for name, value in model.named_parameters()}
    save_file(weights, temporary / "model.safetensors")
    save_file({name: value.contiguous() for name, value in average.items()}, temporary / "average.safetensors")
    save_file(tensors, temporary / "optimizer.safetensors")
    record = {"step": state.step, "tokens": state.tokens, "seconds": state.seconds, "optimizer": scalars}
    (temporary / "state.json").write_text(json.dumps(record))
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    for old in _checkpoints(directory)[:-keep]:
        shutil.rmtree(old)
    return target


def load_checkpoint(
    checkpoint: Path, model: nn.Module, average: dict[str, Tensor], optimizers: list[torch.optim.Optimizer]
) -> RunState:
    """Put a checkpoint's values into the model, the average and the optimizers, in place, and return its state."""
    record = json.loads((checkpoint / "state.json").read_text())
    weights = load_file(checkpoint / "model.safetensors")
    averaged = load_file(checkpoint / "average.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
            average[name].copy_(averaged[name])
    values: list[dict[int, dict[str, Any]]] = [{} for _ in optimizers]
    tensors: dict[str, Any] = dict(load_file(checkpoint / "optimizer.safetensors"))
    for key, value in (tensors | record["optimizer"]).items():
        which, index, name = key.split(".", 2)
        values[int(which)].setdefault(int(index), {})[name] = value
    for optimizer, state in zip(optimizers, values, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return RunState(record["step"], record["tokens"], record["seconds"])


# --- the loop ---------------------------------------------------------------------------------------------------------


def train(
    model: nn.Module,
    sample: Sampler,
    config: LoopConfig,
    out: Path,
    *,
    resume: bool = True,
    stop_at: int | None = None,
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
    on_checkpoint: Callable[[Moment], dict[str, float]] | None = None,
) -> RunState:
    """Train a causal language model to predict the next token.

    Args:
        model: called as ``model(input_ids=(batch, tokens))``; its result has ``logits`` (batch, tokens, vocabulary).
        sample: gives the windows; see `Sampler`.
        config: the schedule.
        out: receives ``log.jsonl`` and ``checkpoints/``.
        resume: go on from the newest checkpoint in ``out``, if there is one; otherwise its checkpoints and log go.
        stop_at: stop after this many steps as an interruption would, with a checkpoint but short of the budget.
        loss: of (model, ids, targets), instead of the cross-entropy of the targets.
        on_checkpoint: called after each checkpoint and at the end; the numbers it returns go to the log.

    Returns:
        What was done. The model holds the final weights.

    Raises:
        FloatingPointError: if the loss stops being a number.
    """
    # The precision is set below, call by call: accelerate has one for the whole process and refuses another run's.
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())
    checkpoints = out / "checkpoints"
    if not resume:
        shutil.rmtree(checkpoints, ignore_errors=True)
        (out / "log.jsonl").unlink(missing_ok=True)
    checkpoints.mkdir(parents=True, exist_ok=True)
    optimizers = make_optimizers(model, config)
    bare = model.to(accelerator.device)
    average = {name: p.detach().clone().float() for name, p in bare.named_parameters()}
    found = _checkpoints(checkpoints)
    state = load_checkpoint(found[-1], bare, average, optimizers) if found else RunState()

    def compute_loss(ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            if loss is not None:
                return loss(bare, ids, targets)
            logits = bare(input_ids=ids).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    loss_of = torch.compile(compute_loss, dynamic=False) if config.compile else compute_loss
    bare.train()
    began = time.monotonic() - state.seconds
    last_checkpoint = time.monotonic()
    log_loss, log_steps, log_tokens, log_began = torch.zeros((), device=accelerator.device), 0, 0, time.monotonic()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>5.1f} %"),
        TimeElapsedColumn(),
    )

    def log(record: dict[str, Any]) -> None:
        if accelerator.is_main_process:
            with (out / "log.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")

    def checkpoint(progress: float) -> None:
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            return
        state.seconds = time.monotonic() - began
        save_checkpoint(checkpoints, state, bare, average, optimizers)
        if on_checkpoint is not None:
            bare.eval()
            numbers = on_checkpoint(Moment(state, progress, bare, average))
            bare.train()
            log({"step": state.step, "tokens": state.tokens, "seconds": round(state.seconds, 1), **numbers})

    with Progress(*columns, disable=not accelerator.is_main_process) as bar:
        task = bar.add_task("training", total=1.0)
        while (progress := config.progress(state.step, state.seconds)) < 1 and state.step != stop_at:
            phase, rate = config.phase(progress), config.rate(state.step, progress)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * rate
            parts = phase.batch // phase.micro_batch // accelerator.num_processes
            for part in range(parts):
                seed = (config.seed, state.step, part, accelerator.process_index)
                drawn = sample(seed, phase.micro_batch, phase.sequence + 1)
                ids, targets = drawn if isinstance(drawn, tuple) else (drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous())
                value = loss_of(ids.to(accelerator.device), targets.to(accelerator.device))
                (value / parts).backward()
                log_loss += value.detach() / parts
            average_gradients(bare, accelerator)
            norm = nn.utils.clip_grad_norm_(bare.parameters(), config.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            state.step += 1
            state.tokens += phase.batch * phase.sequence
            # Processes must agree on the time, or they would disagree on the phase.
            state.seconds = broadcast_object_list([time.monotonic() - began])[0]
            # Early on the plain decay would remember the random start for too long.
            decay = min(config.ema, state.step / (state.step + 10))
            with torch.no_grad():
                for name, parameter in bare.named_parameters():
                    average[name].lerp_(parameter.float(), 1 - decay)
            log_steps, log_tokens = log_steps + 1, log_tokens + phase.batch * phase.sequence
            if log_steps == config.log_every:
                mean = float(log_loss) / log_steps
                if mean != mean:
                    raise FloatingPointError(f"the loss is not a number at step {state.step}")
                speed = log_tokens / (time.monotonic() - log_began)
                log(
                    {
                        "step": state.step,
                        "tokens": state.tokens,
                        "seconds": round(state.seconds, 1),
                        "loss": round(mean, 4),
                        "rate": round(rate, 4),
                        "norm": round(float(norm), 3),
                        "sequence": phase.sequence,
                        "tokens_per_second": round(speed),
                    }
                )
                bar.update(task, completed=progress, description=f"step {state.step}  loss {mean:.3f}  {speed:.0f} tok/s")
                log_loss.zero_()
                log_steps, log_tokens, log_began = 0, 0, time.monotonic()
            if time.monotonic() - last_checkpoint > config.checkpoint_seconds and progress < 1:
                checkpoint(progress)
                last_checkpoint = log_began = time.monotonic()
                log_tokens = 0  # or the speed would count tokens whose time it does not
        bar.update(task, completed=progress)
    checkpoint(progress)
    return state
