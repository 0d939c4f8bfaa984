"""`tessera view`: pictures of a Tensor Memory's cells, writes and reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tessera.cli.errors import one_line_errors

if TYPE_CHECKING:
    from tessera.lab.evaluation.traces import Trace
    from tessera.tensor_memory import TensorMemoryState

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def view(
    state: Annotated[Path | None, typer.Option(help="A saved state (TensorMemoryState.save), whose cells are drawn.")] = None,
    stream: Annotated[
        Path | None, typer.Option(help="Tokens (tokens, dim), .npy or .safetensors, that a memory reads.")
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Weights of the memory of --stream: its state_dict as safetensors, or a file of tessera.save_memory, which "
            "has its options too.  [default: untrained]"
        ),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder of a trained ViT with a memory, as in runs/video/model, which sees a clip.")
    ] = None,
    clip: Annotated[
        Path | None, typer.Option(help="Folder of the frames that --model sees.  [default: digits that it was not trained on]")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Draw a clip of a task: occlusion, map, binding or no harm.  [default: occlusion]")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of training on the task before the clip.", min=1)] = 100,
    channels: Annotated[int, typer.Option(help="Channels of a cell of the memory of --stream.")] = 16,
    grid: Annotated[str, typer.Option(help="Its number of cells along depth, height and width.")] = "6x6x6",
    chunk: Annotated[int, typer.Option(help="Number of tokens that it writes together.", min=1)] = 1,
    update: Annotated[
        str | None, typer.Option(help="Cells that it updates: footprint or all.  [default: footprint, with --paper all]")
    ] = None,
    gates: Annotated[str, typer.Option(help="Input of its gates: state or input.")] = "state",
    paper: Annotated[bool, typer.Option("--paper", help="Use the paper's setting of a memory instead of the default.")] = False,
    sequence: Annotated[int, typer.Option(help="Of the state.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Seed of weights and of the clip.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("results/view"),
) -> None:
    """Draw the cells of a Tensor Memory over time, and where tokens write and read, as PNG and GIF.

    Example:

        tessera view --task occlusion

        tessera view --state state.safetensors

        tessera view --stream tokens.npy --grid 8x8 --channels 32

        tessera view --model runs/video/model
    """

    from tessera.cli.quiet import quiet

    quiet()
    with one_line_errors():
        sources = (("state", state), ("stream", stream), ("model", model), ("task", task))
        given = [name for name, value in sources if value is not None]
        if len(given) > 1:
            words = " and ".join("--" + name for name in given)
            raise ValueError(f"give one of --state, --stream, --model and --task, not {words}")
        if clip is not None and model is None:
            raise ValueError("--clip is what a --model sees")
        if weights is not None and stream is None:
            raise ValueError("--weights are those of the memory of --stream")
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out must be a folder, and {out} is a file")
        import matplotlib  # noqa: F401 - pictures need it, which is said before anything is trained

        from tessera.lab.evaluation import traces as look
        from tessera.lab.evaluation import view_plot

        saved = [out / "state.png"]
        if state is not None:
            view_plot.plot_state(look.sizes(_state(state), sequence), saved[0], state.name)
        else:
            if stream is not None:
                title = f"{stream.name}, weights {'as they start' if weights is None else 'of ' + weights.name}"
                fields = {"channels": channels, "grid": _grid(grid), "chunk": chunk, "gates": gates}
                fields |= {} if update is None else {"update": update}
                traces = [_stream(stream, weights, fields, paper, seed)]
            elif model is not None:
                traces, title = _vit(model, clip, seed)
            else:
                traces, title = _clip(task or "occlusion", steps, paper, seed)
            saved += [out / "trace.png", out / "memory.gif"]
            last = traces[-1]
            name = f"{title}: layer {len(traces)} at the end" if len(traces) > 1 else f"{title}: at the end"
            view_plot.plot_state(last.size[-1], saved[0], name)
            view_plot.plot_trace(traces, saved[1], title)
            view_plot.animate(traces, saved[2], title)
    typer.echo("Saved " + ", ".join(map(str, saved)))


def _state(path: Path) -> TensorMemoryState:
    from tessera.tensor_memory import TensorMemoryState

    if not path.is_file():
        raise FileNotFoundError(f"there is no state at {path}")
    return TensorMemoryState.load(path)


def _grid(words: str) -> tuple[int, ...]:
    sizes = words.lower().split("x")
    if not all(size.isdigit() for size in sizes):
        raise ValueError(f"--grid is as in 6x6x6 or 8x8, got {words!r}")
    return tuple(map(int, sizes))


def _stream(path: Path, weights: Path | None, fields: dict[str, Any], paper: bool, seed: int) -> Trace:
    import torch
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    from tessera.adapters.apply import read_shared
    from tessera.lab.evaluation.traces import follow, read_stream
    from tessera.tensor_memory import TensorMemory, TensorMemoryConfig

    x = read_stream(path)
    config = TensorMemoryConfig.paper(**fields) if paper else TensorMemoryConfig(**fields)
    if weights is not None and not weights.is_file():
        raise FileNotFoundError(f"there are no weights at {weights}")
    try:
        if weights is not None:
            with safe_open(weights, "pt") as file:
                saved = "tessera_memory" in (file.metadata() or {})
            if saved:
                return follow(read_shared(weights), x)
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            memory = TensorMemory(config, x.shape[1])
        if weights is not None:
            memory.load_state_dict(load_file(weights))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{weights} does not fit this memory: {error}") from error
    return follow(memory, x)


def _vit(folder: Path, clip: Path | None, seed: int) -> tuple[list[Trace], str]:
    """Run a trained ViT on a clip; returns traces and a title."""
    from safetensors import SafetensorError
    from torch import Generator

    from tessera.lab.evaluation.traces import follow_vit
    from tessera.lab.models import ViT, ViTConfig
    from tessera.lab.tasks.moving_digits import MovingDigits
    from tessera.lab.tasks.pictures import load_digits, read_frames

    if not folder.is_dir():
        raise FileNotFoundError(f"there is no model at {folder}")
    try:
        kind = ViTConfig.get_config_dict(folder)[0].get("model_type")
        if kind != ViTConfig.model_type:
            raise ValueError(f"it is a {kind}")
        model = ViT.from_pretrained(folder).eval()
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{folder} holds no ViT of Tessera: {error}") from None
    config = model.config
    if clip is not None:
        frames = read_frames(clip, config.image_size, config.num_channels)
        title = f"{folder}: {len(frames)} frames of {clip.name}"
    elif config.num_channels != 1:
        raise ValueError(f"{folder} sees pictures in colour, and digits are grey; give it a --clip")
    elif config.image_size == 8:
        held_out = load_digits().split()[1].pixels
        frames, title = held_out[seed % len(held_out)][None], f"{folder}: a digit"
    else:
        try:
            task = MovingDigits(size=config.image_size, patch=config.patch_size)
        except ValueError as error:
            raise ValueError(f"{folder} cannot see moving digits ({error}); give it a --clip") from None
        clips, _ = task.sample(1, Generator().manual_seed(seed), held_out=True)
        frames, title = clips[0], f"{folder}: {task.frames} frames of moving digits"
    return follow_vit(model, frames), title


def _clip(task: str, steps: int, paper: bool, seed: int) -> tuple[list[Trace], str]:
    """Train a backbone on a task for some steps and run it on one sequence; returns traces and a title."""
    import tempfile

    from torch import Generator

    from tessera.lab.evaluation import diagnostics as plans
    from tessera.lab.evaluation.traces import follow_backbone
    from tessera.lab.training.diagnostics_training import train_diagnostic

    fields = next((own for name, own, _ in plans.MENDED if name == task), {})
    job = plans.job(task, fields, "memory", "the paper's" if paper else "default", steps=steps, seed=seed)
    # A large learning rate, because there are few steps.
    config = plans.config_of({**job, "rate": 3.0})
    with tempfile.TemporaryDirectory() as folder:
        model, found = train_diagnostic(config, Path(folder))
    x, _ = config.task.sample(1, Generator().manual_seed(10**6 + seed))
    traces = follow_backbone(model, x[0].to(model.head.weight.device))
    return traces, f"{plans.title(job)}: accuracy {found['accuracy']:.2f} after {steps} steps (guessing {found['chance']:.2f})"
