"""Texts and questions of the long-context tasks, and the commands that evaluate caches on them."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("accelerate", reason="the extra lab is not installed")

from tessera.cache import Cache
from tessera.cli import app
from tessera.evaluation import load
from tessera.lab.evaluation import long_context
from tessera.lab.evaluation.long_context_plot import plot_needle, plot_ruler
from tessera.lab.tasks.prose import ADJECTIVES, NOUNS, VERBS, WORDS, sentence
from tessera.lab.tasks.retrieval import RULER, Example, fit, needle, score


def run(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["eval", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def example(task: str, units: int = 200, seed: int = 0, tokens: int = 2048) -> Example:
    return RULER[task].make(units, Random(seed), tokens)


@pytest.fixture(scope="module")
def source() -> Any:
    return load(None)


def test_words_are_there_once_and_sentences_differ() -> None:
    assert len(WORDS) == len({*ADJECTIVES, *NOUNS, *VERBS}) == len(ADJECTIVES) + len(NOUNS) + len(VERBS)
    random = Random(0)
    assert len({sentence(random) for _ in range(1000)}) > 990


@pytest.mark.parametrize("task", RULER)
def test_an_example_hides_what_it_asks_for_and_is_the_same_again(task: str) -> None:
    found, again, other = example(task), example(task), example(task, seed=1)
    assert found == again
    assert found.answers != other.answers
    assert all(answer in found.text for answer in found.answers)
    assert not any(answer in found.question + found.begin for answer in found.answers)
    longer = example(task, units=2 * 200)
    assert longer.answers == found.answers
    assert len(longer.text) > 1.4 * len(found.text)


@pytest.mark.parametrize(
    ("task", "count", "lines"),
    [
        *(("single_1", 1, 1), ("single_2", 1, 1), ("single_3", 1, 1), ("multikey_1", 1, 4)),
        *(("multikey_2", 1, 201), ("multikey_3", 1, 201), ("multivalue", 4, 4), ("multiquery", 4, 4)),
    ],
)
def test_needles_are_as_many_as_the_task_says(task: str, count: int, lines: int) -> None:
    found = example(task)
    assert len(set(found.answers)) == count
    assert found.text.count("The special") == lines
    assert sum(found.text.count(answer) for answer in found.answers) == count


def test_a_needle_stands_at_its_depth() -> None:
    for depth in (0.0, 0.25, 1.0):
        found = needle(depth).make(400, Random(0), 2048)
        text = found.text.partition("\n\n")[2]
        assert text.index("The special number") / len(text) == pytest.approx(depth, abs=0.05)


def test_a_chain_of_variables_can_be_followed() -> None:
    found = example("vt")
    value = found.question.split("value ")[1].split()[0]
    known = {value}
    for line in found.text.rpartition("Remember and follow")[2].splitlines():
        if line.startswith("VAR "):
            name, _, given = line.removeprefix("VAR ").partition(" = ")
            assert given.removeprefix("VAR ") in known
            known.add(name)
    assert known == {value, *found.answers}
    assert len(found.answers) == 5


@pytest.mark.parametrize("tokens", [1024, 8192])
def test_frequent_words_are_the_most_frequent_ones(tokens: int) -> None:
    for task, units in (("cwe", 100), ("cwe", 3000), ("fwe", 400)):
        found = example(task, units=units, tokens=tokens)
        text = found.text.rpartition("\n\n")[2].split()
        counts = {word: text.count(word) for word in set(text) if word != "..." and not word[:-1].isdigit()}
        least = min(counts[word] for word in found.answers)
        assert all(count < least for word, count in counts.items() if word not in found.answers)


@pytest.mark.parametrize("tokens", [700, 2048])
@pytest.mark.parametrize("task", RULER)
def test_an_example_fills_the_tokens_that_it_is_given(source: Any, task: str, tokens: int) -> None:
    if task in ("multikey_3", "vt", "cwe") and tokens == 700:
        tokens = 1500  # the demo model's tokenizer has few words
    prompt = fit(RULER[task], source.tokenizer, tokens, "seed")
    assert prompt == fit(RULER[task], source.tokenizer, tokens, "seed")
    room = tokens - RULER[task].new_tokens
    assert 0.75 * room < len(prompt.ids) <= room
    behind = source.tokenizer.decode(prompt.ids[-prompt.behind :])
    assert 20 < prompt.behind < len(prompt.ids) / 2
    assert behind.rstrip().endswith(":")
    assert "?" in behind


def test_an_example_is_asked_in_a_chat_where_there_is_one(source: Any) -> None:
    plain = fit(needle(0.5), source.tokenizer, 700, "seed")
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}{% if add_generation_prompt %}<ai>{% endif %}"
    )
    try:
        source.tokenizer.chat_template = template
        chat = fit(needle(0.5), source.tokenizer, 700, "seed")
    finally:
        source.tokenizer.chat_template = None
    assert chat.answers == plain.answers
    text = source.tokenizer.decode(chat.ids)
    assert text.startswith("<user>")
    assert "</><ai>The special number" in text


def test_too_few_tokens_are_refused(source: Any) -> None:
    with pytest.raises(ValueError, match="50 tokens are too few"):
        fit(needle(0.5), source.tokenizer, 50, "seed")


def test_a_score_is_the_share_of_the_answers() -> None:
    assert score("it is 12 and ABC", ("12", "abc")) == 1
    assert score("12, 13", ("12", "14", "15", "13")) == 0.5


def test_the_answer_reads_the_text_through_the_cache(source: Any) -> None:
    """The answer has the exact model's likelihood with an exact cache, and another with a coarse cache."""
    prompt = fit(needle(0.2), source.tokenizer, 700, "seed")
    right = source.tokenizer(" " + prompt.answers[0], add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*prompt.ids, *right]])
    with torch.inference_mode():
        logits = source.model(ids, use_cache=False).logits[0, len(prompt.ids) - 1 : -1]
        made = source.model.generate(
            ids[:, : len(prompt.ids)], attention_mask=ids[:, : len(prompt.ids)] * 0 + 1, max_new_tokens=8, do_sample=False
        )
    exact = float(torch.nn.functional.cross_entropy(logits, torch.tensor(right)))
    cache = Cache("dense", source.model)
    nats, written = long_context.answer(source, prompt, cache, 8, 64)
    assert nats == pytest.approx(exact, abs=1e-4)
    assert written == source.tokenizer.decode(made[0, len(prompt.ids) :], skip_special_tokens=True)
    assert cache.get_seq_length() >= len(prompt.ids)
    coarse, _ = long_context.answer(source, prompt, Cache("sink:4 + int:2 + recent:16", source.model), 8, 64)
    forgot, _ = long_context.answer(source, prompt, Cache("sink:4 + window:64", source.model), 8, 64)
    assert abs(coarse - exact) > 0.01
    assert abs(forgot - exact) > 0.01


SMALL = ("--samples", 1, "--chunk", 128)


def test_needles_are_measured_drawn_and_saved_and_go_on(tmp_path: Path) -> None:
    asked = ("--depths", 0, 100, *SMALL, "--out", tmp_path)
    code, out, _ = run("needle", "--lengths", 300, *asked, "--specs", "dense", "sink:4 + int:2 + recent:16")
    assert code == 0
    first = json.loads((tmp_path / "needle.json").read_text())["rows"]
    assert {(row["spec"], row["depth"]) for row in first} == {
        (spec, depth) for spec in ("dense", "sink:4 + int:2 + recent:16") for depth in (0, 100)
    }
    assert all(len(row["scores"]) == len(row["nats"]) == 1 for row in first)
    assert "300 tokens" in out
    assert (tmp_path / "needle.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = run("needle", "--lengths", 300, 400, *asked, "--specs", "dense")
    rows = json.loads((tmp_path / "needle.json").read_text())["rows"]
    assert rows[: len(first)] == first
    assert len(rows) == len(first) + 2
    assert "int:2" not in out


def test_tasks_are_measured_drawn_and_saved(tmp_path: Path) -> None:
    code, out, _ = run("ruler", "--lengths", 512, "--tasks", "single_1", "fwe", *SMALL, "--specs", "dense", "--out", tmp_path)
    assert code == 0
    rows = json.loads((tmp_path / "ruler.json").read_text())["rows"]
    assert [row["task"] for row in rows] == ["single_1", "fwe"]
    assert "single_1" in out
    assert (tmp_path / "ruler.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("ruler", "--tasks", "singel_1"), "no task 'singel_1'"),
        (("needle", "--depths", "101"), "from 0 to 100"),
        (("needle", "--lengths", "100000"), "more than the 2048"),
        (("needle", "--lengths", "70"), "too few"),
        (("needle", "--specs", "recnet:8"), "recent"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    code, _, error = run(*words, "--out", tmp_path)
    assert code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1


def made(spec: str, task: str, length: int, score: float, **more: Any) -> dict[str, Any]:
    job = long_context._job("m", spec, task, length, 2, 0, 64)
    return {**job, "scores": [score, score], "nats": [1.0, 2.0], "written": ["", ""], "bits": 4.0, "nbytes": 1, **more}


def test_what_the_model_cannot_do_itself_is_said(tmp_path: Path) -> None:
    specs = ("dense", "hqmq:4")
    rows = [made(spec, task, n, 1.0 if task == "vt" else 0.25) for spec in specs for task in ("vt", "cwe") for n in (512, 1024)]
    head, lines = long_context.grid(rows, "task", length=512)
    assert head == ["cache", "bits", "vt", "cwe"]
    assert lines[1] == ["hqmq:4", "4.00", "100% 1.500", "(25% 1.500)"]
    (remark,) = long_context.remarks(rows, "task")
    assert "cwe (512 tokens: 25%, 1,024 tokens: 25% with the exact cache)" in remark
    plot_ruler(rows, tmp_path / "ruler.png")
    needles = [made(spec, "needle", n, 0.25, depth=d) for spec in specs for n in (512, 1024) for d in (0, 50)]
    assert "the needle" in long_context.remarks(needles, "length")[0]
    # Without the exact cache no score of the model is printed.
    assert long_context.remarks([row for row in needles if row["spec"] != "dense"], "length") == []
    plot_needle(needles, tmp_path / "needle.png")
    assert (tmp_path / "needle.png").stat().st_size > 5000
