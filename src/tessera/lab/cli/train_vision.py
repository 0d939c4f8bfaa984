"""`tessera train image` and `tessera train video`: small vision transformers from scratch, with or without a memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tessera.cli.errors import one_line_errors
from tessera.lab.cli.say import say
from tessera.lab.cli.shared_options import (
    Batch,
    Heads,
    Hidden,
    Layers,
    MicroBatch,
    Precision,
    Resume,
    Seed,
    Steps,
    TensorBoard,
    TensorMemory,
)


def image(
    data: Annotated[
        Path | None, typer.Option(help="Folder of folders of pictures, which name the labels.  [default: digits]")
    ] = None,
    ask: Annotated[str, typer.Option(help="Target: label, or pixels of hidden patches.")] = "label",
    share: Annotated[float, typer.Option(help="Share of the patches that are hidden, for pixels.")] = 0.5,
    size: Annotated[int, typer.Option(help="Side in pixels to which pictures of a folder are scaled.", min=1)] = 32,
    patch: Annotated[int | None, typer.Option(help="Side of a patch.  [default: 2, with --data 4]", min=1)] = None,
    memory: TensorMemory = "default",
    out: Annotated[Path, typer.Option(help="Directory of the run: log, model, image.json, image.png.")] = Path("runs/image"),
    hidden: Hidden = 64,
    layers: Layers = 2,
    heads: Heads = 4,
    batch: Batch = 64,
    micro_batch: MicroBatch = None,
    steps: Steps = 300,
    precision: Precision = "no",
    seed: Seed = 0,
    tensorboard: TensorBoard = True,
    resume: Resume = True,
) -> None:
    """Train a ViT from scratch to label pictures, or to fill in their hidden patches.

    Example:

        tessera train image

        tessera train image --ask pixels --memory none

        tessera train image --data flowers --size 64 --patch 8 --steps 5000
    """
    from tessera.cli.quiet import quiet

    quiet()
    from tessera.lab.tasks.digits import Digits
    from tessera.lab.tasks.pictures import load_digits, read_pictures
    from tessera.lab.training.vision import VisionConfig, train_vision

    with one_line_errors():
        pictures = load_digits() if data is None else read_pictures(data, size)
        task = Digits(ask, share, patch or (2 if data is None else 4), pictures)  # type: ignore[arg-type]
        model = ("all", _memory(memory), hidden, layers, heads)
        config = VisionConfig(
            *model, batch=batch, micro_batch=micro_batch, steps=steps, seed=seed, precision=precision, tensorboard=tensorboard
        )
        found = train_vision(config, task, out, "image", resume=resume)
    _report(found, "accuracy" if ask == "label" else "share of the variance recovered", out)


def video(
    data: Annotated[
        Path | None,
        typer.Option(help="Folder label/clip/frame.png: say what a clip shows.  [default: moving digits, which is hidden?]"),
    ] = None,
    frames: Annotated[int, typer.Option(help="Frames of a clip.", min=1)] = 16,
    size: Annotated[int, typer.Option(help="Pixels along a side of a frame.", min=1)] = 32,
    patch: Annotated[int, typer.Option(help="Side of a patch.", min=1)] = 8,
    attention: Annotated[str, typer.Option(help='Frames that a patch sees: "all", "frame" or "window:4".')] = "frame",
    memory: TensorMemory = "default",
    out: Annotated[Path, typer.Option(help="Directory of the run: log, model, video.json, video.png.")] = Path("runs/video"),
    hidden: Hidden = 64,
    layers: Layers = 2,
    heads: Heads = 4,
    batch: Batch = 16,
    micro_batch: MicroBatch = None,
    steps: Steps = 800,
    precision: Precision = "no",
    seed: Seed = 0,
    tensorboard: TensorBoard = True,
    resume: Resume = True,
) -> None:
    """Train a ViT from scratch to name the currently hidden digit, or to label clips of a folder.

    With attention "frame" or "window:4" the model can be run frame by frame; earlier frames are known by the memory only.

    Example:

        tessera train video

        tessera train video --attention window:4 --memory none

        tessera train video --data actions --size 64 --frames 32 --steps 5000
    """
    from tessera.cli.quiet import quiet

    quiet()
    from tessera.lab.tasks.clips import Clips
    from tessera.lab.tasks.moving_digits import MovingDigits
    from tessera.lab.tasks.pictures import read_clips
    from tessera.lab.training.vision import Task, VisionConfig, train_vision

    with one_line_errors():
        task: Task = MovingDigits(frames, size, patch=patch) if data is None else Clips(read_clips(data, frames, size), patch)
        model = (attention, _memory(memory), hidden, layers, heads)
        config = VisionConfig(
            *model, batch=batch, micro_batch=micro_batch, steps=steps, seed=seed, precision=precision, tensorboard=tensorboard
        )
        found = train_vision(config, task, out, "video", resume=resume)
    _report(found, "accuracy", out)


def _memory(word: str) -> dict[str, Any] | None:
    from tessera.tensor_memory import TensorMemoryConfig

    # Two-dimensional, like pictures.
    grid = (8, 8)
    known = {"none": None, "default": TensorMemoryConfig(grid=grid), "paper": TensorMemoryConfig.paper(grid=grid)}
    if word not in known:
        raise ValueError(f"memory must be one of {', '.join(known)}, got {word!r}")
    config = known[word]
    return None if config is None else config.to_dict()


def _report(found: dict[str, Any], what: str, out: Path) -> None:
    if "score" in found:
        say(
            f"{what} {found['score']:.3f} on what was held out (chance {found['chance']:.3f}, at most {found['ceiling']:.0f}); "
            f"{found['parameters']:,} parameters, {found['seconds']:.0f} seconds; model in {out / 'model'}"
        )
