"""A run on disk: its recipe, and checkpoints of safetensors and JSON, never pickle."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tessera.files import atomic_path


@dataclass
class RunState:
    """The progress of a run."""

    step: int = 0
    """Optimizer steps."""
    tokens: int = 0
    """Tokens predicted."""
    seconds: float = 0.0
    """Time spent training, checkpoints and evaluation included."""
    losses: list[float] = field(default_factory=list)
    """Losses of the steps since the last line of the log."""


def claim(out: Path, recipe: dict[str, Any]) -> None:
    """Record a recipe in the run's directory, or check that it is the one recorded.

    Raises:
        ValueError: if the directory holds a run of another recipe, naming what differs.
    """
    text = json.dumps(recipe, indent=1)
    path = out / "recipe.json"
    if path.is_file() and path.read_text() != text:
        before, now = json.loads(path.read_text()), json.loads(text)
        name = next((n for n in {**before, **now} if before.get(n) != now.get(n)), "its order")
        raise ValueError(f"{out} holds a run of another recipe ({name} differs); choose another directory or start afresh")
    out.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def checkpoints_in(directory: Path) -> list[Path]:
    """List complete checkpoints, the oldest first."""
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
    (temporary / "state.json").write_text(json.dumps({**asdict(state), "optimizer": scalars}))
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    for old in checkpoints_in(directory)[:-keep]:
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
    for key, value in (tensors | record.pop("optimizer")).items():
        which, index, name = key.split(".", 2)
        values[int(which)].setdefault(int(index), {})[name] = value
    for optimizer, state in zip(optimizers, values, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return RunState(**record)
