"""Atomic writing of files, and safe reading of files that may be damaged or malicious."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open
from torch import Tensor

#: Maximum number of characters of a file's contents that a message quotes, and of a message that quotes them.
SHOWN, WHOLE = 200, 1000


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to `path` when the block succeeds, remove it otherwise."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.stem}.{uuid.uuid4().hex}{target.suffix}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], record: object) -> None:
    """Write a record as JSON, completely or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def brief(found: object, most: int = SHOWN) -> str:
    """Shorten an error or a file's contents for a message: to one line of about `most` characters."""
    text = str(found) if isinstance(found, BaseException | str) else repr(found)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= most else f"{text[:most]}..."


class TensorFile:
    """An open safetensors file, for use within the block of `open_tensors`."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.metadata: dict[str, str] = file.metadata() or {}
        self.names: list[str] = list(file.keys())

    def get(self, name: str) -> Tensor:
        """Return a tensor by its name; its size is that of its bytes in the file."""
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except (TypeError, RuntimeError, OverflowError, AttributeError) as error:  # a shape or dtype that torch does not have
            raise SafetensorError(f"tensor {name!r} cannot be read: {error}") from None
        return tensor


@contextmanager
def open_tensors(path: str | os.PathLike[str], what: str) -> Iterator[TensorFile]:
    """Open a safetensors file.

    Args:
        path: path of the file.
        what: the description of a failure, such as "is no saved cache".

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is a folder or no safetensors file, or, within the block, if a tensor of it cannot be read.
    """
    if os.path.isdir(path):
        raise ValueError(f"{os.fspath(path)} {what}: it is a folder")
    try:
        with safe_open(path, "pt") as file:
            yield TensorFile(file)
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)} {what}: {brief(error)}") from None


def read_json(text: str) -> Any:
    """Parse a text of JSON.

    Raises:
        ValueError: if it is none, is nested too deeply, or holds NaN or infinity, which JSON does not have.
    """

    def refuse(word: str) -> NoReturn:
        raise ValueError(f"{word} is no number of JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_utf8(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 text file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty or no UTF-8 text.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no text file {file}")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise ValueError(f"{file} is empty")
    return text
