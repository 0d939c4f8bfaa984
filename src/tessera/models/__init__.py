"""Models that come with Tessera: a small language model of Python source code, and the text it never saw.

The model is a 5-million-parameter Llama trained by this project (`tessera train demo`), small enough to ship and good
enough to measure on: it uses its whole context, so what a cache forgets shows in its answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tessera.models.demo_text import heldout_files, heldout_text

__all__ = ["demo_path", "heldout_files", "heldout_text", "load_demo"]


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
