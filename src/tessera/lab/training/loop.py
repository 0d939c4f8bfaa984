"""One training loop on `accelerate`, small enough to read: schedule, step, log, checkpoint, resume.

The schedule runs over *progress*, a number from 0 to 1: steps done over steps planned, or seconds trained over seconds
allowed. Counting seconds lets a run on a shared machine end when it must with its learning rate at zero.

The batch of a step is drawn by seed and step, and split among processes and forward passes: their number changes speed and
rounding, not the run.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tessera.cache import TruncatedBPTTCache
from tessera.lab.training.checkpoints import RunState, checkpoints_in, load_checkpoint, save_checkpoint
from tessera.lab.training.log import Log
from tessera.lab.training.optimizers import make_optimizers
from tessera.lab.training.schedule import LoopConfig, Phase

Sampler = Callable[[tuple[int, ...], int, int], "Tensor | tuple[Tensor, Tensor]"]
"""``(seed, batch, length) -> (batch, length)`` token ids, each to be predicted from those before it; or the ids and what is
to be predicted at each, -100 for nothing. By its arguments alone: otherwise a resumed run differs."""

IGNORED = -100
"""Target of a place where nothing is to be predicted."""


@dataclass(frozen=True)
class Moment:
    """The argument of hooks of `train`."""

    state: RunState
    """Steps, tokens and seconds so far."""
    progress: float
    """From 0 to 1; 1 is the end of the run."""
    model: nn.Module
    """The model in training, unwrapped."""
    average: dict[str, Tensor]
    """Averaged weights by parameter name, float32."""


def average_gradients(model: nn.Module, accelerator: Accelerator) -> None:
    """Replace every gradient by its mean over the processes, in one reduction."""
    if accelerator.num_processes == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    mean = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), reduction="mean")
    for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


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
    show: bool = True,
) -> RunState:
    """Train a causal language model to predict the next token.

    Under ``torchrun`` every process calls this; they start from the weights of the first.

    Args:
        model: called as ``model(input_ids=(batch, tokens))``; its result has ``logits`` (batch, tokens, vocabulary).
        sample: gives the windows; see `Sampler`.
        config: the schedule.
        out: receives ``log.jsonl``, ``checkpoints`` and, if asked for, ``tensorboard``.
        resume: go on from the newest checkpoint in ``out``, if there is one; otherwise its checkpoints and log go.
        stop_at: stop after this many steps as an interruption would, with a checkpoint but short of the budget.
        loss: the mean over the places of (model, ids, targets), instead of the cross-entropy of the targets.
        on_checkpoint: called after each checkpoint and at the end; the numbers it returns go to the log.
        show: draw a bar.

    Returns:
        What was done. The model holds the final weights.

    Raises:
        FloatingPointError: if the loss stops being a number; the weights are those before that step.
        ValueError: if the batches cannot be shared out among the processes, or there are segments and the model has no bounded
            state to keep.
    """
    if any(phase.segments > 1 for phase in config.phases):
        if loss is not None:
            raise ValueError("a loss of one's own and segments do not go together")
        TruncatedBPTTCache(model)  # refuses invalid settings before anything is done
    # The precision is set below, call by call: accelerate has one for the whole process and refuses another run's.
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())
    main, rank, processes = accelerator.is_main_process, accelerator.process_index, accelerator.num_processes
    for phase in config.phases:
        phase.together(processes)
    checkpoints = out / "checkpoints"
    if main:
        if not resume:
            for folder in (checkpoints, out / "tensorboard"):
                shutil.rmtree(folder, ignore_errors=True)
            (out / "log.jsonl").unlink(missing_ok=True)
        checkpoints.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    optimizers = make_optimizers(
        model,
        muon_lr=config.muon_lr,
        adamw_lr=config.adamw_lr,
        gate_lr=config.gate_lr,
        weight_decay=config.weight_decay,
    )
    bare = model.to(accelerator.device)
    with torch.no_grad():
        for parameter in bare.parameters():
            parameter.copy_(broadcast(parameter.detach()))
    average = {name: p.detach().clone().float() for name, p in bare.named_parameters()}
    found = checkpoints_in(checkpoints)
    state = load_checkpoint(found[-1], bare, average, optimizers) if found else RunState()

    def compute_loss(ids: Tensor, targets: Tensor, cache: TruncatedBPTTCache | None = None) -> Tensor:
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            if loss is not None:
                return loss(bare, ids, targets)
            logits = bare(input_ids=ids, **({} if cache is None else {"past_key_values": cache})).logits
        total = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return total / (targets != IGNORED).sum().clamp(min=1)

    loss_of = torch.compile(compute_loss, dynamic=False) if config.compile else compute_loss
    log = Log(out, config.tensorboard, state.step) if main else None
    noisy = [accelerator.device] if accelerator.device.type == "cuda" else []

    def learn(phase: Phase) -> float:
        """Put the gradient of one step's batch into the parameters; returns its loss."""
        drawn = sample((config.seed, state.step), phase.batch, phase.length + 1)
        ids, targets = drawn if isinstance(drawn, tuple) else (drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous())
        # Gradients are averaged over the processes, so each counts its targets against a process's share of all.
        asked = max(1, int((targets != IGNORED).sum())) / processes
        share = phase.batch // processes
        ids, targets = (x[rank * share : (rank + 1) * share].to(accelerator.device) for x in (ids, targets))
        total = torch.zeros((), device=accelerator.device)
        # Random numbers within the model depend on the step only, so that a resumed run draws the same.
        with torch.random.fork_rng(noisy):
            torch.manual_seed(int(np.random.SeedSequence((config.seed, state.step, rank)).generate_state(1)[0]))
            for rows in zip(*(x.split(phase.together(processes)) for x in (ids, targets)), strict=True):
                cache = TruncatedBPTTCache(bare) if phase.segments > 1 else None
                for part, wanted in zip(*(x.chunk(phase.segments, dim=1) for x in rows), strict=True):
                    value = loss_of(part, wanted, cache) * (int((wanted != IGNORED).sum()) / asked)
                    value.backward()
                    total += value.detach()
                    if cache is not None:
                        cache.detach()
        average_gradients(bare, accelerator)
        return float(accelerator.reduce(total, reduction="mean"))

    bare.train()
    began = time.monotonic() - state.seconds
    last_checkpoint = state.seconds
    log_tokens, log_began = 0, time.monotonic()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>5.1f} %"),
        TimeElapsedColumn(),
    )

    def checkpoint(progress: float) -> None:
        accelerator.wait_for_everyone()
        if log is None:
            return
        state.seconds = time.monotonic() - began
        save_checkpoint(checkpoints, state, bare, average, optimizers)
        if on_checkpoint is not None:
            bare.eval()
            numbers = on_checkpoint(Moment(state, progress, bare, average))
            bare.train()
            log({"step": state.step, "tokens": state.tokens, "seconds": round(state.seconds, 1), **numbers})

    with Progress(*columns, disable=not (main and show)) as bar:
        task = bar.add_task("training", total=1.0)
        while (progress := config.progress(state.step, state.seconds)) < 1 and state.step != stop_at:
            phase, rate = config.phase(progress), config.rate(state.step, progress)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * rate
            state.losses.append(learn(phase))
            if not math.isfinite(state.losses[-1]):
                raise FloatingPointError(f"the loss is not a number at step {state.step + 1}")
            norm = nn.utils.clip_grad_norm_(bare.parameters(), config.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            state.step += 1
            state.tokens += phase.tokens
            # Processes must agree on the time, or they would disagree on the phase.
            state.seconds = broadcast_object_list([time.monotonic() - began])[0]
            # Early in training the plain decay would keep the random initialisation for too long.
            decay = min(config.ema, state.step / (state.step + 10))
            with torch.no_grad():
                for name, parameter in bare.named_parameters():
                    average[name].lerp_(parameter.float(), 1 - decay)
            log_tokens += phase.tokens
            progress = config.progress(state.step, state.seconds)
            if state.step % config.log_every == 0 or progress >= 1:
                mean = sum(state.losses) / len(state.losses)
                speed = log_tokens / (time.monotonic() - log_began)
                state.losses.clear()
                log_tokens, log_began = 0, time.monotonic()
                if log is not None:
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
            if state.seconds - last_checkpoint > config.checkpoint_seconds and progress < 1:
                last_checkpoint = state.seconds
                checkpoint(progress)
                # The speed must not count tokens whose time is not counted.
                log_tokens, log_began = 0, time.monotonic()
        bar.update(task, completed=progress)
    checkpoint(progress)
    if log is not None:
        log.close()
    accelerator.wait_for_everyone()
    return state
