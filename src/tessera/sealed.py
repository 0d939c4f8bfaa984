"""A seal in a safetensors file: a SHA-256 of all its bytes, which shows whether it was truncated or altered since.

The seal stands in the file's own header. It is computed over the file with zeros in its place, so it covers header and tensors,
and the file stays a normal safetensors file. It finds damage, not malice: anyone can seal a file.
"""

from __future__ import annotations

import hashlib
import os
import struct

from tessera.files import open_tensors

#: Its name in the header.
SEAL = "tessera_seal"
#: The placeholder before the file is sealed, which is also hashed in place of the seal.
OPEN = "sha256:" + "0" * 64
#: No header is longer; safetensors refuses it.
MOST = 100_000_000
#: Number of bytes hashed at a time.
PART = 1 << 22


def seal(path: str | os.PathLike[str]) -> None:
    """Seal a file that was saved with `OPEN` under `SEAL` in its metadata; it is changed where it is.

    Raises:
        ValueError: if it was not.
    """
    found, at = _digest(path, OPEN)
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(found.encode())


def check_seal(path: str | os.PathLike[str], what: str) -> None:
    """Compare the seal with the file.

    Args:
        path: path of the file.
        what: the description of a file that is no safetensors file, such as "is no saved cache".

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it has no seal, was cut short or altered.
    """
    name = os.fspath(path)
    with open_tensors(path, f"{what}, or was cut short") as file:
        said = file.metadata.get(SEAL)
    if said is None:
        raise ValueError(f"{name} {what}: it has no seal")
    if len(said) != len(OPEN) or _digest(path, said)[0] != said:
        raise ValueError(f"{name} was altered or damaged since it was written: its bytes are not those that its seal tells of")


def _digest(path: str | os.PathLike[str], said: str) -> tuple[str, int]:
    """Compute the seal that a file should have in place of `said`, and its position."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        size = file.read(8)
        header = file.read(min(struct.unpack("<Q", size)[0], MOST))
        if header.count(said.encode()) != 1:
            raise ValueError(f"{os.fspath(path)} has no place for a seal, or several")
        digest.update(size + header.replace(said.encode(), OPEN.encode()))
        while part := file.read(PART):
            digest.update(part)
    return f"sha256:{digest.hexdigest()}", len(size) + header.index(said.encode())
