"""Labelled pictures and clips: the handwritten digits of scikit-learn, or the user's folders."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

#: One in so many pictures is held out.
HELD_OUT = 5

#: Suffixes of picture files.
ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures or clips.

    Attributes:
        pixels: (n, channels, size, size), or (n, frames, channels, size, size), float32 from 0 to 1.
        labels: (n,) int64.
        names: names of the labels.
    """

    pixels: Tensor
    labels: Tensor
    names: tuple[str, ...]

    def split(self) -> tuple[Pictures, Pictures]:
        """Split into pictures for training and held-out ones: every `HELD_OUT`-th of each label.

        Raises:
            ValueError: if there are too few.
        """
        held = torch.zeros(len(self.labels), dtype=torch.bool)
        for label in range(len(self.names)):
            held[(self.labels == label).nonzero().flatten()[HELD_OUT - 1 :: HELD_OUT]] = True
        if not held.any():
            raise ValueError(
                f"there must be {HELD_OUT} of one label at least, of which one is held out; there are fewer of each"
            )
        parts = (Pictures(self.pixels[mark], self.labels[mark], self.names) for mark in (~held, held))
        return next(parts), next(parts)


def load_digits() -> Pictures:
    """1,797 handwritten digits, 8 x 8 (E. Alpaydin and C. Kaynak, UCI, 1998), as scikit-learn has them.

    Raises:
        ModuleNotFoundError: without scikit-learn.
    """
    try:
        from sklearn import datasets
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the digits come with scikit-learn: pip install 'tessera[lab]'") from None
    found = datasets.load_digits()
    pixels = torch.from_numpy(np.asarray(found.images, dtype=np.float32) / 16).unsqueeze(1)
    return Pictures(pixels, torch.from_numpy(found.target.astype(np.int64)), tuple(map(str, range(10))))


def read_pictures(folder: str | os.PathLike[str], size: int, channels: int = 3) -> Pictures:
    """Read a folder of pictures, in one folder for each label, or in none, in which case the folder's name is the label.

    Folders without pictures, and names that begin with a dot, are ignored.

    Args:
        folder: such as "flowers", with "flowers/rose/1.jpg" or "flowers/1.jpg".
        size: that pictures are made to have, by cutting off what is longer and scaling.
        channels: 3, or 1 for grey.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if there are no pictures in it, or for a size or channels that pictures cannot have.
    """
    _check(size, channels)
    labels = [inner for inner in _folders(folder) if _files(inner)] or [Path(folder)]
    found = [(path, label) for label, inner in enumerate(labels) for path in _files(inner)]
    if not found:
        raise ValueError(
            f"{os.fspath(folder)} holds no pictures: expected {', '.join(ENDINGS)}, in a folder for each label or in none"
        )
    pixels = torch.stack([_read(path, size, channels) for path, _ in found])
    return Pictures(pixels, torch.tensor([label for _, label in found]), tuple(inner.resolve().name for inner in labels))


def read_clips(folder: str | os.PathLike[str], frames: int, size: int, channels: int = 3) -> Pictures:
    """A folder of folders of clips, each a folder of frames in the order of their names, numbers by value; the outer ones name
    the labels.

    Args:
        folder: such as "actions", with "actions/jump/clip7/0001.png".
        frames: taken of each clip, at equal distances; a clip of fewer is refused.
        size, channels: see `read_pictures`.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if there are no clips in it, or one is too short; see `read_pictures` too.
    """
    _check(size, channels)
    if frames < 1:
        raise ValueError(f"a clip needs 1 frame at least, got {frames}")
    labels = [outer for outer in _folders(folder) if _folders(outer)]
    clips, numbers = [], []
    for label, outer in enumerate(labels):
        for inner in _folders(outer):
            files = _files(inner)
            if len(files) < frames:
                raise ValueError(f"{inner} has {len(files)} frames, and {frames} were asked for")
            chosen = np.linspace(0, len(files) - 1, frames).round().astype(int)
            clips.append(torch.stack([_read(files[i], size, channels) for i in chosen]))
            numbers.append(label)
    if not clips:
        raise ValueError(f"{os.fspath(folder)} holds no clips: expected label/clip/frame.png")
    return Pictures(torch.stack(clips), torch.tensor(numbers), tuple(outer.name for outer in labels))


def read_frames(folder: str | os.PathLike[str], size: int, channels: int = 3) -> Tensor:
    """The pictures of one folder as a clip, (frames, channels, size, size), in the order of their names, numbers by value.

    Args:
        folder: such as "clip7", with "clip7/0001.png".
        size, channels: see `read_pictures`.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if there are no pictures in it; see `read_pictures` too.
    """
    _check(size, channels)
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {os.fspath(folder)}")
    files = _files(Path(folder))
    if not files:
        raise ValueError(f"{os.fspath(folder)} holds no frames: expected {', '.join(ENDINGS)}")
    return torch.stack([_read(path, size, channels) for path in files])


def _folders(folder: str | os.PathLike[str]) -> list[Path]:
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {os.fspath(folder)}")
    return _seen(path for path in Path(folder).iterdir() if path.is_dir())


def _files(folder: Path) -> list[Path]:
    return _seen(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS and path.is_file())


def _seen(paths: Iterable[Path]) -> list[Path]:
    """List files that are not hidden, in natural order: "2" before "10"."""

    def parts(path: Path) -> list[tuple[int, int, str]]:
        return [(0, int(t), t) if t.isdecimal() else (1, 0, t) for t in re.split(r"(\d+)", path.name) if t]

    return sorted((path for path in paths if not path.name.startswith(".")), key=parts)


def _check(size: int, channels: int) -> None:
    if size < 1 or channels not in (1, 3):
        raise ValueError(f"pictures have 1 pixel a side at least and 1 or 3 channels, got size {size} and {channels} channels")


def _read(path: Path, size: int, channels: int) -> Tensor:
    """(channels, size, size) from 0 to 1."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):  # Pillow would clip values above 255
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            fitted = ImageOps.fit(upright.convert("L" if channels == 1 else "RGB"), (size, size))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} is no picture that can be read: {error}") from None
    return torch.from_numpy(np.asarray(fitted, dtype=np.float32).copy() / 255).view(size, size, channels).permute(2, 0, 1)
