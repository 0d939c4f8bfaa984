"""Loading of models and texts: from the package, a folder, or the hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.evaluation.gguf import gguf_config, gguf_file, load_gguf
from tessera.files import read_utf8

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Source:
    """A model with its tokenizer.

    Attributes:
        name: name of the folder or file, or on the hub.
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
    """

    name: str
    model: Any
    tokenizer: Any

    @property
    def context(self) -> int | None:
        """Longest sequence that the model was made for, if its configuration says so."""
        return getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def load(
    name: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    memory: str | os.PathLike[str] | None = None,
) -> Source:
    """Load a causal language model.

    Args:
        name: a folder, a GGUF file, a folder with one, or the name of a model on the hub; None: the demo model, which ships
            with the package.
        dtype: one of `DTYPES`; None: float32 on a CPU, else as it was saved.
        device: where to put it.
        memory: a file that `tessera.save_memory` wrote for the model, to be attached; None: none.

    Raises:
        FileNotFoundError: if there is no such folder or file.
        ValueError: if what is there cannot be used, saying why.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"no dtype {dtype!r}; there are {', '.join(DTYPES)}")
    wanted = dtype or ("float32" if device == "cpu" else "auto")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used here: {_first_line(error)}") from error
    torch_dtype = "auto" if wanted == "auto" else getattr(torch, wanted)
    if memory is not None and not Path(memory).is_file():
        raise FileNotFoundError(f"there is no memory {os.fspath(memory)}")
    if name is None:
        from tessera.models import load_demo

        model, tokenizer = load_demo(dtype=torch_dtype)
        source = Source("the demo model", model.to(device), tokenizer)
    else:
        path = Path(name).expanduser()
        file = gguf_file(path)
        if file is not None:
            model, tokenizer = load_gguf(file, torch_dtype)
            source = Source(file.stem, model.eval().to(device), tokenizer)
        else:
            source = Source(path.resolve().name if path.is_dir() else name, *_from_pretrained(name, torch_dtype, device))
    if memory is not None:
        from tessera.adapters import load_memory

        load_memory(source.model, memory)
    return source


def load_config(name: str | None = None) -> Any:
    """Read the config of a model, and nothing of its weights.

    Args:
        name: a folder, its config.json, a GGUF file, a folder with one, or a name on the hub; None: the demo model.

    Raises:
        FileNotFoundError: if there is no such folder or file.
        ValueError: if what is there cannot be used, saying why.
    """
    if name is None:
        from tessera.models import demo_path

        name = str(demo_path())
    path = Path(name).expanduser()
    if path.name == "config.json" and path.is_file():
        name = str(path.parent)
    file = gguf_file(Path(name).expanduser())
    return gguf_config(file) if file is not None else _config(_place(name))


def _place(name: str) -> str:
    """Return a model's folder or hub name in the form that transformers takes."""
    looks_local = name.lower().endswith((".gguf", ".json")) or name.startswith((".", "/", "~")) or name.count("/") > 1
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{name} is no model: the folder has no config.json and no GGUF file")
        return str(path)
    if looks_local or path.is_file():
        raise FileNotFoundError(f"there is no model folder or GGUF file {name}")
    return name


def _config(name: str) -> Any:
    from transformers import AutoConfig, PreTrainedConfig

    from tessera.models import introduce

    try:
        introduce(PreTrainedConfig.get_config_dict(name)[0].get("model_type"))
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load {name}: {_first_line(error)}") from error


def _from_pretrained(name: str, dtype: Any, device: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = _place(name)
    config = _config(name)
    kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
    saved = getattr(config, "architectures", None) or []
    if kind is None or (saved and kind.__name__ not in saved):
        what = saved[0] if saved else config.model_type
        raise ValueError(f"{name} is a {what}, not a causal language model")
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ValueError(f"cannot load {name}: {_first_line(error)}") from error
    return model.eval().to(device), tokenizer


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_text(files: Sequence[str | os.PathLike[str]] = ()) -> tuple[str, str]:
    """Read text files as one text, or the held-out modules of the standard library where none is given.

    Returns:
        the text, and a name for it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a file is empty or no UTF-8 text.
    """
    if not files:
        from tessera.models import heldout_text

        return heldout_text(), "standard-library modules held out of the demo model's training"
    return "\n\n".join(map(read_utf8, files)), ", ".join(Path(f).name for f in files)


def encode(tokenizer: Any, text: str) -> Tensor:
    """Tokenise a text to (tokens,) int64, with the special tokens that the tokenizer puts in front."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)


def windows(ids: Tensor, length: int, count: int | None, bos: int | None, skip: int = 0) -> Tensor:
    """Cut a text into windows that each begin as a text does.

    Args:
        ids: (tokens,) int64.
        length: tokens of a window, the first of them included.
        count: windows at the most; None: as many as there are.
        bos: token that begins a text, put before every window; None if the model has none.
        skip: tokens of the text that are left out before the first window; a `bos` in front does not count.

    Returns:
        (windows, length) int64; one shorter window if less than `length` tokens are left of the text.

    Raises:
        ValueError: if fewer than two tokens are left to predict from.
    """
    first = 0 if bos is None else 1
    if bos is not None and len(ids) and ids[0] == bos:
        ids = ids[1:]
    if skip > 0 and len(ids) - skip + first < 2:
        raise ValueError(f"the text has {len(ids)} tokens; nothing to predict is left behind the {skip} that are skipped")
    ids = ids[skip:]
    length = min(length, len(ids) + first)
    if length < 2:
        raise ValueError(f"the text has {len(ids)} tokens, too few to predict one from another")
    body = length - first
    rows = ids[: len(ids) // body * body].view(-1, body)[:count]
    return rows if bos is None else torch.cat((rows.new_full((len(rows), 1), bos), rows), dim=1)
