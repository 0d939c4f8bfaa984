"""Loading of models in llama.cpp's GGUF files, whose weights are unpacked."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

#: Packages that transformers needs to read such a file.
PACKAGES = ("gguf", "accelerate")


def gguf_file(path: Path) -> Path | None:
    """Return the GGUF file at a path: the path itself, or the only one in a folder without a model. None if there is none.

    Raises:
        ValueError: if a folder has several.
    """
    if path.is_file():
        return path if path.suffix.lower() == ".gguf" else None
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    found = sorted(file for file in path.iterdir() if file.is_file() and file.suffix.lower() == ".gguf")
    if len(found) > 1:
        raise ValueError(f"{path} has {len(found)} GGUF files; name one of them, as in {found[0]}")
    return found[0] if found else None


def load_gguf(file: Path, dtype: Any) -> tuple[Any, Any]:
    """Load the causal language model in a GGUF file, and its tokenizer.

    Args:
        file: a file of any quantisation that transformers knows; the weights are unpacked, so they take the room of `dtype`.
        dtype: dtype of the unpacked weights, or "auto".

    Raises:
        ValueError: if a package is missing, the file is damaged or holds something else, or transformers reads its tokenizer
            without the token that texts begin with.
    """
    _check(file)
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": file.name}
    folder = str(file.parent)
    options: dict[str, Any] = {"dtype": dtype}
    if hasattr(transformers, "GgufConfig"):
        # Otherwise newer versions leave weights packed where they have kernels for them.
        options["quantization_config"] = transformers.GgufConfig(gguf_file=file.name, dequantize=True)
    try:
        config = AutoConfig.from_pretrained(folder, **where)
        kind = type(config)
        if AutoModelForCausalLM._model_mapping.get(kind, None) is None:
            raise ValueError(f"it holds a {config.model_type}, not a causal language model")
        model = AutoModelForCausalLM.from_pretrained(folder, **where, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **where)
    except Exception as error:  # Readers of a binary format raise all kinds of errors on damaged bytes.
        raise _refusal(file, error) from error
    first = _first_token(file)
    if first is not None and tokenizer("a")["input_ids"][:1] != [first]:
        raise ValueError(
            f"transformers {transformers.__version__} leaves out token {first}, with which texts begin by the tokenizer in "
            f"{file}; upgrade transformers"
        )
    return model, tokenizer


def _first_token(file: Path) -> int | None:
    """Return the token that the file's tokenizer puts before a text, or None."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    fields = [reader.get_field(f"tokenizer.ggml.{name}") for name in ("add_bos_token", "bos_token_id")]
    adds, token = (None if field is None else int(field.parts[field.data[0]][0]) for field in fields)
    return token if adds else None


def gguf_config(file: Path) -> Any:
    """Read the config of the model in a GGUF file, without its weights.

    Raises:
        ValueError: if a package is missing, or the file is damaged or holds something else.
    """
    _check(file)
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
    except Exception as error:  # As above.
        raise _refusal(file, error) from error


def _check(file: Path) -> None:
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ValueError(f"to read {file} the package {' and '.join(missing)} is needed: pip install 'tessera[gguf]'")
    with open(file, "rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError(f"{file} is no GGUF file: it does not begin with the letters GGUF")


def _refusal(file: Path, error: Exception) -> ValueError:
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ValueError(f"cannot load {file}: {said}; if the file is whole, transformers cannot read its kind")
