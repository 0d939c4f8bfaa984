"""The model that comes with Tessera: a small language model of Python source code, and the text it never saw.

The model is a 5-million-parameter Llama trained by this project (`tessera train demo`), small enough to ship and good
enough to measure on: it uses its whole context, so what a cache loses changes its predictions.

Models to train are in `tessera.lab.models`; those that were here in version 0.1 can still be imported from here.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from tessera.models.demo_text import heldout_text

__all__ = [
    "GPT",
    "GPTConfig",
    "ViT",
    "ViTConfig",
    "demo_memory_path",
    "demo_path",
    "heldout_files",
    "heldout_text",
    "load_demo",
]

#: Entry points of this group are model classes by the ``model_type`` of their configurations, and the names of version 0.1.
GROUP = "tessera.models"


def __getattr__(name: str) -> Any:
    for each in entry_points(group=GROUP, name=name):
        return each.load()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def introduce(model_type: str | None) -> None:
    """Import the class behind a configuration, which registers itself with transformers' Auto classes.

    Args:
        model_type: the field of a configuration; nothing happens unless an entry point of ``tessera.models`` has this name.
    """
    for each in entry_points(group=GROUP, name=model_type or ""):
        each.load()


def demo_path() -> Path:
    """Return the directory of the demo model, ready for ``from_pretrained``.

    Raises:
        FileNotFoundError: if its weights are not installed.
    """
    path = Path(__file__).parent / "demo"
    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"The demo model's weights are not at {path}. Reinstall tessera, or train them: tessera train demo --install"
        )
    return path


def demo_memory_path() -> Path:
    """Return the file of the demo model's Tensor Cache, made for "sink:4 + window:256 + tc", ready for `tessera.load_memory`.

    Raises:
        FileNotFoundError: if it is not installed.
    """
    path = Path(__file__).parent / "demo" / "memory.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"the demo model's memory is not at {path}; train it: tessera train memory")
    return path


def load_demo(**options: Any) -> tuple[Any, Any]:
    """Return the demo model, in evaluation mode, and its tokenizer. Nothing is downloaded.

    Args:
        options: passed to ``AutoModelForCausalLM.from_pretrained``; ``dtype`` is float32 unless given, which is what
            CPUs without bf16 instructions need.

    Raises:
        FileNotFoundError: if the weights are not installed.

    Example:
        >>> from tessera.models import load_demo
        >>> model, tokenizer = load_demo()
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = demo_path()
    options.setdefault("dtype", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, **options)
    return model.eval(), AutoTokenizer.from_pretrained(path, local_files_only=True)
