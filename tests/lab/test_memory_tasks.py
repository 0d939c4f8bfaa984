"""Scores of simple strategies on the diagnostic tasks: full knowledge, the current frame, a window, and guessing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from tessera.lab.tasks.associative_recall import IGNORED
from tessera.lab.tasks.binding import Binding
from tessera.lab.tasks.map_building import MapBuilding
from tessera.lab.tasks.no_harm import NoHarm
from tessera.lab.tasks.occlusion import VELOCITIES, Occlusion

TASKS = [
    Occlusion(),
    Occlusion(delay=3, patch=16),
    Occlusion(hidden=3, ask="back"),
    Occlusion.paper(4),
    MapBuilding(delay=5),
    MapBuilding.paper(16),
    Binding(pairs=6, delay=4),
    Binding.paper(6),
    NoHarm(symbols=5, steps=9),
    NoHarm(symbols=5, steps=9, rule="given", delay=4),
]


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_sequences_have_their_shape_and_the_same_seed_draws_the_same(task: Any) -> None:
    x, targets = task.sample(7, Generator().manual_seed(3))
    assert x.shape == (7, task.length, task.features)
    assert targets.shape == (7, task.length)
    asked = targets != IGNORED
    assert bool((asked == asked[0]).all())
    assert int(asked[0].sum()) >= 1
    assert 0 <= int(targets[asked].min()) <= int(targets[asked].max()) < task.classes
    assert task.length % task.frame == 0
    for again, same in ((3, True), (4, False)):
        assert torch.equal(task.sample(7, Generator().manual_seed(again))[0], x) is same


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_guessing_is_at_chance(task: Any) -> None:
    _, targets = task.sample(4000, Generator().manual_seed(0))
    answers = targets[targets != IGNORED]
    shares = torch.bincount(answers, minlength=task.classes) / len(answers)
    assert float(shares.max()) == pytest.approx(task.chance, abs=0.03)


def follow(x: Tensor, task: Occlusion) -> tuple[Tensor, Tensor]:
    """Return the position of the ball's first pixel in each frame, (batch, frames, 2), and whether it is visible."""
    side = 16 // task.patch
    pixels = x[..., : task.patch**2].unflatten(1, (-1, side, side)).unflatten(-1, (task.patch, task.patch))
    frames = pixels.permute(0, 1, 2, 4, 3, 5).reshape(len(x), -1, 16, 16)
    first = (frames * frames.roll(-1, 2) * frames.roll(-1, 3)).flatten(2)
    place = first.argmax(-1)
    return torch.stack((place % 16, place // 16), dim=-1), first.amax(-1) > 0


def of_frames(targets: Tensor, task: Occlusion) -> Tensor:
    return targets[:, task.frame - 1 :: task.frame]


def quadrant(places: Tensor) -> Tensor:
    return (places[..., 0] >= 8) + 2 * (places[..., 1] >= 8)


@pytest.mark.parametrize("task", [Occlusion(), Occlusion(delay=3, patch=16), Occlusion(hidden=2, frames=9, patch=4)], ids=repr)
def test_whoever_follows_the_ball_knows_where_it_is_while_hidden(task: Occlusion) -> None:
    x, targets = task.sample(400, Generator().manual_seed(1))
    places, seen = follow(x, task)
    shown = task.frames - task.hidden
    assert seen[:, :shown].all()
    assert not seen[:, shown:].any()
    velocity = (places[:, shown - 1] - places[:, shown - 2] + 8) % 16 - 8
    since = torch.arange(1, task.hidden + 1)
    expected = quadrant((places[:, shown - 1, None] + velocity[:, None] * since[:, None]) % 16)
    wanted = of_frames(targets, task)
    assert task.ceiling == 1
    assert torch.equal(wanted[:, -task.hidden :], expected)
    assert (wanted[:, : -task.hidden] == IGNORED).all()


def test_whoever_follows_the_ball_knows_whether_it_is_back_where_it_should_be() -> None:
    task = Occlusion(hidden=3, ask="back")
    x, targets = task.sample(400, Generator().manual_seed(1))
    places, seen = follow(x, task)
    velocity = (places[:, 1] - places[:, 0] + 8) % 16 - 8
    expected = (places[:, 0] + velocity * 8) % 16
    moved = (places[:, -1] != expected).any(-1)
    assert torch.equal(of_frames(targets, task)[:, -1], moved.long())
    assert seen[:, -1].all()
    # Training targets include the hidden positions; nothing else differs.
    same, hints = task.lesson(400, Generator().manual_seed(1))
    assert torch.equal(same, x)
    since = torch.arange(5, 8)
    unseen = quadrant((places[:, 0, None] + velocity[:, None] * since[:, None]) % 16)
    assert torch.equal(of_frames(hints, task)[:, 5:8], 2 + unseen)
    hints.view(400, -1, task.frame)[:, 5:8] = IGNORED
    assert torch.equal(hints, targets)
    assert (quadrant(places[:, -1]) != quadrant(expected))[moved].all()
    # The frame alone has no information: both answers are equally frequent in every position.
    assert task.stateless == task.chance == 0.5
    assert task.ceiling == 1


def test_with_the_end_hidden_the_last_frame_is_worth_nothing_and_in_the_original_everything() -> None:
    for hidden in (2, 4, 6):
        paper = Occlusion.paper(hidden)
        assert paper.stateless == paper.ceiling == 1
        x, targets = paper.sample(200)
        assert torch.equal(quadrant(follow(x, paper)[0][:, -1]), of_frames(targets, paper)[:, -1])
        mended = Occlusion(hidden=hidden)
        assert mended.stateless == mended.chance == 0.25
        x, _ = mended.sample(200)
        blank = x[:, -mended.frame * hidden :]
        assert torch.equal(blank[:1].expand_as(blank), blank)


def test_one_frame_tells_where_the_ball_is_and_not_where_it_goes() -> None:
    task = Occlusion(frames=8, hidden=7)
    found = task.best(8)
    assert task.chance < found < 1
    # Counted for the first hidden frame: a ball in a corner of its quadrant leaves it in 5 of 8 directions, at a side in 3.
    one = Occlusion(frames=2, hidden=1)
    inside, side, corner = 36 / 64, 24 / 64, 4 / 64
    assert one.ceiling == pytest.approx(inside + side * 5 / 8 + corner * 3 / 8)
    assert len(VELOCITIES) == 8


@pytest.mark.parametrize(("glimpses", "ceiling"), [(16, 0.809), (32, 0.916), (64, 0.977)])
def test_the_ceiling_of_the_original_map_is_that_of_cells_seen(glimpses: int, ceiling: float) -> None:
    task = MapBuilding.paper(glimpses)
    assert task.ceiling == pytest.approx(ceiling, abs=5e-4)
    x, targets = task.sample(4000, Generator().manual_seed(2))
    known = recall_map(task, x)
    wanted = targets[:, -1]
    right = torch.where(known[:, -1] >= 0, known[:, -1] == wanted, wanted == 0)
    assert float(right.float().mean()) == pytest.approx(ceiling, abs=0.02)


def recall_map(task: MapBuilding, x: Tensor, newest: int | None = None) -> Tensor:
    """Return what the newest tokens before each question show of the queried cell, -1 for nothing, (batch, queries)."""
    size = task.size
    place = x[..., 5 : 5 + size].argmax(-1) * size + x[..., 5 + size : 5 + 2 * size].argmax(-1)
    bits = (x[..., -4:] > 0).long()
    found = []
    for at in range(task.length - task.queries, task.length):
        cells = torch.full((len(x), size * size), -1)
        for t in range(0 if newest is None else max(0, at + 1 - newest), min(at, task.glimpses)):
            for i, further in enumerate((0, 1, size, size + 1)):
                cells.scatter_(1, place[:, t : t + 1] + further, bits[:, t, i : i + 1])
        found.append(cells.gather(1, place[:, at : at + 1]))
    return torch.cat(found, dim=1)


def test_only_seen_cells_are_asked_for_and_a_window_as_short_as_the_delay_has_none_of_them() -> None:
    task = MapBuilding(glimpses=8, delay=6, queries=3)
    x, targets = task.sample(100, Generator().manual_seed(5))
    assert torch.equal(recall_map(task, x), targets[:, -task.queries :])
    assert (recall_map(task, x, newest=task.delay + 1)[:, 0] == -1).all()
    assert task.ceiling == 1
    assert task.stateless == 0.5


@settings(max_examples=8, deadline=None)
@given(size=st.integers(2, 9), glimpses=st.integers(1, 12), queries=st.integers(1, 6))
def test_places_of_a_map_are_those_of_its_cells(size: int, glimpses: int, queries: int) -> None:
    task = MapBuilding(size=size, glimpses=glimpses, queries=queries)
    x, targets = task.sample(3)
    assert torch.equal(recall_map(task, x), targets[:, -queries:])
    last = x[:, -queries:]
    row, column = last[..., 5 : 5 + size].argmax(-1), last[..., 5 + size : 5 + 2 * size].argmax(-1)
    torch.testing.assert_close(last[..., 3:5], 2 * torch.stack((column, row), dim=-1) / (size - 1) - 1)


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.1])
def test_the_nearest_place_has_the_answer(noise: float) -> None:
    task = Binding(pairs=12, noise=noise, delay=5, queries=3)
    x, targets = task.sample(300, Generator().manual_seed(1))
    places, asked = x[:, :12, 3:6], x[:, -3:, 3:6]
    nearest = (asked[:, :, None] - places[:, None]).square().sum(-1).argmin(-1)
    assert torch.equal(x[:, :12, 6:].argmax(-1).gather(1, nearest), targets[:, -3:])
    # The nearest match of a question is nearly always its source.
    off = (asked[:, :, None] - places[:, None]).norm(dim=-1).amin(-1)
    assert float(off.mean()) <= 1.7 * noise
    between = x[:, 12:-3]
    assert torch.equal(between[:1, :1].expand_as(between), between)


def test_counting_needs_the_current_token_only_and_a_given_rule_the_first() -> None:
    one, given_ = NoHarm(symbols=7, steps=20), NoHarm(symbols=7, steps=20, rule="given", delay=3)
    x, targets = one.sample(200)
    assert torch.equal((x[..., :7].argmax(-1) + 1) % 7, targets)
    x, targets = given_.sample(2000, Generator().manual_seed(0))
    shown, rule = x[:, 4:, :7].argmax(-1), x[:, 0, 7:].argmax(-1)
    assert torch.equal((shown + rule[:, None]) % 7, targets[:, 4:])
    # For each visible symbol, all answers are equally frequent.
    together = torch.bincount((shown * 7 + targets[:, 4:]).flatten(), minlength=49) / shown.numel()
    assert float(together.max()) < 1.2 / 49
    assert (one.stateless, given_.stateless) == (1, given_.chance)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (Occlusion, {"hide": "start"}, "hide must be 'end' or 'middle'"),
        (Occlusion, {"ask": "never"}, "'back' or 'last'"),
        (Occlusion, {"hidden": 8}, "less than the 8 frames, got 8"),
        (Occlusion, {"hidden": 0}, "no hidden frames to ask in"),
        (Occlusion, {"delay": -1}, "delay must not be negative"),
        (Occlusion, {"patch": 3}, "patch must be 1, 2, 4, 8 or 16, got 3"),
        (MapBuilding, {"glimpses": 0}, "glimpses and queries 1"),
        (MapBuilding, {"ask": "all"}, "ask must be 'seen' or 'any'"),
        (Binding, {"pairs": 0}, "pairs and queries must be at least 1"),
        (Binding, {"noise": float("nan")}, "noise"),
        (NoHarm, {"rule": "two"}, "rule must be 'one' or 'given'"),
        (NoHarm, {"symbols": 1}, "symbols must be at least 2"),
    ],
)
def test_tasks_that_cannot_be_are_refused(kind: type, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**fields)
