"""Image and clip tasks: their targets, the scores of guessing and of full knowledge, and user folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sklearn", reason="the extra lab is not installed")
pytest.importorskip("PIL", reason="the extra lab is not installed")

from PIL import Image

from tessera.lab.models.vit import to_patches
from tessera.lab.tasks import digits, moving_digits
from tessera.lab.tasks.digits import Digits
from tessera.lab.tasks.moving_digits import BAR, MovingDigits
from tessera.lab.tasks.pictures import Pictures, load_digits, read_clips, read_pictures

DIGITS = load_digits()


def test_digits_are_split_so_that_no_picture_is_on_both_sides() -> None:
    assert DIGITS.pixels.shape == (1797, 1, 8, 8)
    assert DIGITS.pixels.min() == 0
    assert DIGITS.pixels.max() == 1
    learned, held = DIGITS.split()
    assert len(learned.labels) + len(held.labels) == 1797
    assert 0.18 < len(held.labels) / 1797 < 0.2
    for label in range(10):
        assert (held.labels == label).sum() > 30
    both = (learned.pixels.flatten(1).unsqueeze(1) == held.pixels.flatten(1)).all(-1)
    assert not both.any()


def test_labels_by_guessing_and_by_knowing() -> None:
    task = Digits(pictures=DIGITS)
    pixels, labels = task.test()
    assert pixels.shape == (len(labels), 1, 8, 8)
    right = torch.nn.functional.one_hot(labels, 10).float()
    assert task.score(right, labels) == task.ceiling == 1
    commonest = torch.zeros(len(labels), 10)
    commonest[:, labels.bincount().argmax()] = 1
    assert task.score(commonest, labels) == pytest.approx(task.chance)
    assert 0.1 <= task.chance < 0.12


@pytest.mark.parametrize(("hidden", "count"), [(0.5, 8), (0.25, 4), (0.9, 14)])
def test_pixels_by_guessing_and_by_knowing(hidden: float, count: int) -> None:
    task = Digits("pixels", hidden, pictures=DIGITS)
    pixels, targets = task.test()
    asked = targets != digits.IGNORED
    assert torch.equal(asked.all(-1), asked.any(-1))
    assert (asked.any(-1).sum(1) == count).all()
    whole = to_patches(pixels, 2)
    assert torch.equal(whole[asked], targets[asked])
    assert task.score(whole, targets) == task.ceiling == 1
    mean = to_patches(task.part(False).pixels.mean(0, keepdim=True), 2).expand_as(whole)
    assert task.score(mean, targets) == pytest.approx(task.chance, abs=1e-6)


def test_the_same_seed_draws_the_same() -> None:
    for task in (Digits("pixels", pictures=DIGITS), MovingDigits(pictures=DIGITS)):
        first, again = (task.sample(4, torch.Generator().manual_seed(5)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[0], task.sample(4, torch.Generator().manual_seed(6))[0])


@settings(max_examples=15, deadline=None)
@given(
    frames=st.integers(2, 40),
    shape=st.one_of(
        st.tuples(st.sampled_from([32, 40]), st.integers(8, 16), st.just(1)),
        st.sampled_from([(32, 16, 8), (33, 16, 4), (64, 16, 8)]),
    ),
    stay=st.integers(1, 7),
    seed=st.integers(0, 1000),
)
def test_a_clip_asks_for_what_cannot_be_seen_and_has_been(
    frames: int, shape: tuple[int, int, int], stay: int, seed: int
) -> None:
    size, bar, step = shape
    task = MovingDigits(frames, size, bar, patch=1, step=step, stay=stay, pictures=DIGITS)
    pixels, labels, places = task.draw(6, torch.Generator().manual_seed(seed))
    clip, targets = task.render(pixels, places), task.targets(labels, places)
    assert clip.shape == (6, frames, 1, size, size)
    assert places.min() >= 0
    assert places.max() <= size - 8
    assert (labels[:, 0] != labels[:, 1]).all()
    left, right = task.edges
    assert (clip[..., left:right] == BAR).all()
    for row in range(6):
        for t in (targets[row] != moving_digits.IGNORED).nonzero().flatten().tolist():
            which = 0 if labels[row, 0] == targets[row, t] else 1
            assert labels[row, which] == targets[row, t]
            # Replacing the hidden digit does not change the visible pixels.
            other = pixels.clone()
            other[row, which] = 1
            assert torch.equal(task.render(other, places)[row, t], clip[row, t])
            # The whole digit was visible before: some frame shows its pixels.
            shown = []
            for x, y in places[row, :t, which].tolist():
                if x + 8 <= left or x >= right:
                    at = slice(y, y + 8), slice(x, x + 8)
                    shown += [torch.equal(clip[row, s, 0][at], pixels[row, which]) for s in range(t)]
            assert any(shown)


@pytest.mark.parametrize("step", [1, 8])
def test_digits_bounce_and_move_evenly(step: int) -> None:
    _, _, places = MovingDigits(60, step=step, pictures=DIGITS).draw(20, torch.Generator().manual_seed(1))
    steps = places.diff(dim=1)
    assert steps.abs().max() == 2 * step
    assert (places % step == 0).all()
    assert (steps[..., 0].amax(1) > 0).all()
    assert (steps[..., 0].amin(1) < 0).all()


@pytest.mark.parametrize("stay", [2, 5])
def test_digits_stay_behind_the_bar_and_move_on(stay: int) -> None:
    task = MovingDigits(60, stay=stay, pictures=DIGITS)
    _, _, places = task.draw(20, torch.Generator().manual_seed(1))
    _, _, quick = MovingDigits(60, pictures=DIGITS).draw(20, torch.Generator().manual_seed(1))
    left, right = task.edges
    for row, which in ((row, which) for row in range(20) for which in range(2)):
        wanted = []
        for place in quick[row, :, which].tolist():
            wanted += [place] * (stay if left <= place[0] <= right - 8 else 1)
        assert places[row, :, which].tolist() == wanted[:60]


def test_some_clips_to_learn_from_show_one_digit_and_ask_for_it_once_seen() -> None:
    task = MovingDigits(alone=0.25, pictures=DIGITS)
    clip, targets = task.sample(8, torch.Generator().manual_seed(3))
    _, labels, places = task.draw(8, torch.Generator().manual_seed(3))
    left, right = task.edges
    seen = (torch.cat((clip[..., :left], clip[..., right:]), -1) > 0).flatten(2).any(-1)
    for row in range(2):
        first = int(seen[row].int().argmax())
        assert (targets[row, :first] == moving_digits.IGNORED).all()
        assert (targets[row, first:] == labels[row, 0]).all()
    assert torch.equal(targets[2:], task.targets(labels, places)[2:])
    tested = task.sample(8, torch.Generator().manual_seed(3), held_out=True)[1]
    _, labels, places = task.draw(8, torch.Generator().manual_seed(3), held_out=True)
    assert torch.equal(tested, task.targets(labels, places))


def test_clips_by_guessing_and_by_knowing() -> None:
    task = MovingDigits(pictures=DIGITS)
    _, labels, places = task.draw(1500, torch.Generator().manual_seed(2), held_out=True)
    targets = task.targets(labels, places)
    assert 0.1 < float((targets != moving_digits.IGNORED).float().mean()) < 0.6
    know = torch.nn.functional.one_hot(targets.clamp(min=0), 10).float()
    assert task.score(know, targets) == task.ceiling == 1
    # The other digit is known, so the answer is any but that one.
    guess = torch.rand(*targets.shape, 10)
    other = torch.where(labels[:, :1] == targets, labels[:, 1:], labels[:, :1])
    guess.scatter_(2, other.unsqueeze(-1), -1)
    assert task.score(guess, targets) == pytest.approx(task.chance, abs=0.02)


def picture(path: Path, shade: int, size: tuple[int, int] = (9, 6)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 0, 255)).save(path)


def test_folders_of_pictures_and_of_frames_are_read(tmp_path: Path) -> None:
    for shade in (0, 255):
        for number in range(6):
            picture(tmp_path / "a" / f"shade{shade}" / f"{number}.png", shade)
            for frame in range(5):
                picture(tmp_path / "b" / f"shade{shade}" / f"clip{number}" / f"{frame:02}.png", 50 * frame)
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    found = read_pictures(tmp_path / "a", 4)
    assert found.pixels.shape == (12, 3, 4, 4)
    assert found.names == ("shade0", "shade255")
    assert found.pixels[:, 0].amax((1, 2)).tolist() == [0.0] * 6 + [1.0] * 6
    assert read_pictures(tmp_path / "a", 4, channels=1).pixels.shape == (12, 1, 4, 4)
    assert Digits(pictures=found).test()[1].tolist() == [0, 1]
    clips = read_clips(tmp_path / "b", 3, 4)
    assert clips.pixels.shape == (12, 3, 3, 4, 4)
    torch.testing.assert_close(clips.pixels[0, :, 0, 0, 0], torch.tensor([0, 100, 200]) / 255)
    with pytest.raises(ValueError, match="has 5 frames, and 6 were asked for"):
        read_clips(tmp_path / "b", 6, 4)
    with pytest.raises(ValueError, match="holds no pictures"):
        read_pictures(tmp_path / "b", 4)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        read_pictures(tmp_path / "c", 4)
    (tmp_path / "a" / "shade0" / "bad.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"bad\.png is no picture"):
        read_pictures(tmp_path / "a", 4)
    with pytest.raises(ValueError, match="there must be 5 of one label"):
        Pictures(torch.zeros(4, 1, 8, 8), torch.arange(4), tuple("abcd")).split()


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (Digits, {"ask": "name"}, "'label' or 'pixels', got 'name'"),
        (Digits, {"patch": 3}, "patch 3 does not divide pictures of 8"),
        (Digits, {"hidden": 1.0}, "hides 16 of 16"),
        (MovingDigits, {"frames": 1}, "two frames at least"),
        (MovingDigits, {"bar": 7}, "bar of 7 columns hides no digit"),
        (MovingDigits, {"size": 24, "bar": 12}, "no room for a digit"),
        (MovingDigits, {"patch": 5}, "patch 5 does not divide"),
        (MovingDigits, {"step": 0}, "with step 0 no digit"),
        (MovingDigits, {"bar": 12}, "with step 8 no digit comes to be whole behind the bar"),
        (MovingDigits, {"alone": 1.0}, "a share from 0 to less than 1, got 1.0"),
    ],
)
def test_tasks_that_cannot_be_are_refused(make: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**fields, pictures=DIGITS)


def test_frames_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for frame in range(12):
        picture(tmp_path / "label" / "clip" / f"frame{frame}.png", 20 * frame)
    shades = read_clips(tmp_path, 12, 4).pixels[0, :, 0, 0, 0]
    torch.testing.assert_close(shades, torch.arange(12) * 20 / 255)


def test_what_is_no_picture_counts_for_nothing(tmp_path: Path) -> None:
    for number in range(6):
        picture(tmp_path / "shade" / f"{number}.png", 10)
        picture(tmp_path / "other" / f"{number}.tif", 10)
    for hidden in (tmp_path / ".git" / "0.png", tmp_path / "shade" / ".0.png"):
        picture(hidden, 0)
    (tmp_path / "shade" / "folder.png").mkdir()
    (tmp_path / "empty").mkdir()
    found = read_pictures(tmp_path, 4)
    assert found.names == ("other", "shade")
    assert len(found.labels) == 12


def test_pictures_without_labels_can_be_filled_in_and_not_named(tmp_path: Path) -> None:
    for number in range(6):
        picture(tmp_path / "all" / f"{number}.png", 10 * number)
    found = read_pictures(tmp_path / "all", 4)
    assert found.names == ("all",)
    assert len(Digits("pixels", pictures=found).test()[0]) == 1
    with pytest.raises(ValueError, match="all pictures have the label 'all'"):
        Digits(pictures=found)


def test_sixteen_bits_and_rotated_pictures_are_read_as_they_look(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_pictures(tmp_path, 4, channels=1).pixels.unique().mul(255).tolist() == [128]
    half = Image.fromarray(np.repeat(np.array([[0, 255]], dtype=np.uint8), 8, axis=0).repeat(4, axis=1))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    half.save(tmp_path / "deep.png", exif=exif)
    assert read_pictures(tmp_path, 8, channels=1).pixels[0, 0, 0].tolist() == [1.0] * 4 + [0.0] * 4


@pytest.mark.parametrize(("size", "channels"), [(0, 3), (4, 4)])
def test_pictures_of_an_impossible_form_are_refused(tmp_path: Path, size: int, channels: int) -> None:
    with pytest.raises(ValueError, match="1 pixel a side at least and 1 or 3 channels"):
        read_pictures(tmp_path, size, channels)
