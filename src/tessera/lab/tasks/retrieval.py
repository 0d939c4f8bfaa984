"""Retrieval tasks on texts of any length: a needle in a haystack, and RULER's synthetic tasks.

After RULER (arXiv 2404.06654), whose tasks these are but for those that need a data set of questions; words, sentences and
prompts are made here. A task is a function of the number of units of its text (sentences, pairs or words), so that a text can
be made as long as a number of tokens, whatever the tokenizer.

| task | what is hidden | what is asked |
| --- | --- | --- |
| needle | a number with a name, in prose, at a given depth | the number |
| single_1, single_2, single_3 | a number in one repeated line, a number in prose, a UUID in prose | it |
| multikey_1, multikey_2, multikey_3 | four of them in prose; nothing but such lines; the same with UUIDs | one of them |
| multivalue, multiquery | four numbers of one name; four names with a number each, in prose | all four |
| vt | a chain of five variables, each given the value of the one before | their names |
| cwe | ten words that are more frequent than all others, in a numbered list | these words |
| fwe | coded words, frequent by a power law | the three most frequent ones |
"""

from __future__ import annotations

import itertools
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from tessera.lab.tasks.prose import WORDS, name, sentence

#: The repeated line of the simplest haystack.
PLAIN = "The grass is green and the sky is blue. The sun is up. One goes out and comes back again."
#: Number of tokens from which the list of words has RULER's number of repeats, and the longer example.
LONG = 4096


@dataclass(frozen=True)
class Example:
    """One text with a question and its answers.

    Attributes:
        text: instruction and haystack.
        question: stands behind the text.
        begin: the beginning of the answer, which the model goes on with.
        answers: all that must be in what it writes.
    """

    text: str
    question: str
    begin: str
    answers: tuple[str, ...]


Make = Callable[[int, Random, int], Example]
"""Makes an example of so many units, for a text of so many tokens. A different number of units changes the filler only."""


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        make: its examples.
        new_tokens: tokens that an answer may have.
        least: units that it needs.
        words: what is asked, in a few words.
    """

    make: Make
    new_tokens: int
    least: int
    words: str


def _number(random: Random) -> str:
    return str(random.randrange(10**6, 10**7))


def _uuid(random: Random) -> str:
    return str(uuid.UUID(int=random.getrandbits(128), version=4))


def _needle(key: str, value: str, kind: str) -> str:
    return f"The special {kind} of {key} is: {value}."


def _distinct(make: Callable[[Random], str], random: Random, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[make(random)] = None
    return list(found)


def _needles(
    haystack: str, keys: int = 1, values: int = 1, asked: int = 1, kind: str = "number", depth: float | None = None
) -> Make:
    """Make a task that hides `keys` names with `values` of a kind each, and asks for all values of `asked` names.

    Args:
        haystack: "prose", "line" (one line repeated) or "needles" (nothing but other needles).
        keys: names.
        values: number of values of each name.
        asked: number of names that are asked for.
        kind: "number", or "UUID" for values and, in a haystack of needles, for names.
        depth: position of the needles, from 0 (first) to 1 (last); None: random.
    """
    one = _uuid if kind == "UUID" else _number
    called = _uuid if kind == "UUID" and haystack == "needles" else name

    def make(units: int, random: Random, tokens: int) -> Example:
        names = _distinct(called, random, keys)
        numbers = _distinct(one, random, keys * values)
        own = {key: numbers[i * values : (i + 1) * values] for i, key in enumerate(names)}
        hidden = [_needle(key, value, kind) for key, given in own.items() for value in given]
        random.shuffle(hidden)
        wanted = random.sample(names, asked)
        at = [random.random() if depth is None else depth for _ in hidden]
        if haystack == "line":
            lines = [PLAIN] * units
        elif haystack == "prose":
            lines = [sentence(random) for _ in range(units)]
        else:
            others = (called(random) for _ in range(units))
            lines = [_needle(other, one(random), kind) for other in others if other not in own]
        # From the last to the first, so that insertions do not move earlier ones.
        for place, line in sorted(zip(at, hidden, strict=True), reverse=True):
            lines.insert(round(place * len(lines)), line)
        many = asked * values > 1
        subject = ", ".join(wanted[:-1]) + f" and {wanted[-1]}" if asked > 1 else wanted[0]
        what = f"special {kind}{'s' if many else ''} of {subject}"
        return Example(
            f"Some special {kind}s are hidden in the following text. Remember them, you will be asked for them.\n\n"
            + (" " if haystack == "prose" else "\n").join(lines),
            f"\n\nWhat {'are all the' if many else 'is the'} {what} that the text mentions?",
            f"The {what} that the text mentions {'are' if many else 'is'}:",
            tuple(value for key in wanted for value in own[key]),
        )

    return make


def _variables(units: int, random: Random, hops: int = 4, letters: int = 5) -> tuple[str, str, list[str]]:
    """Make lines with a chain of assignments among them, the value, and the variables that have it."""
    names = _distinct(lambda r: "".join(r.choices(string.ascii_uppercase, k=letters)), random, hops + 1)
    value = str(random.randrange(10_000, 100_000))
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in itertools.pairwise(names))]
    at = sorted(random.random() for _ in chain)
    lines = [PLAIN] * units
    for place, line in reversed(list(zip(at, chain, strict=True))):
        lines.insert(round(place * len(lines)), line)
    return "\n".join(lines), value, names


def _track(units: int, random: Random, tokens: int) -> Example:
    """Make an example of variable tracking, after a short solved one."""
    ask = "\n\nQuestion: Which variables have the value {} in the text above?"
    begin = "Answer: Following the assignments in the text above, {} variables have the value {}, they are:"
    order = "Remember and follow the chain of variable assignments that is hidden in the following text.\n\n"
    shown, shown_value, shown_names = _variables(10, random, letters=3)
    text, value, names = _variables(units, random)
    solved = (
        f"{order}{shown}{ask.format(shown_value)} {begin.format(len(shown_names), shown_value)} {' '.join(shown_names)}\n\n"
    )
    return Example(solved + order + text, ask.format(value), begin.format(len(names), value), tuple(names))


def _listed(random: Random, frequent: Sequence[str], others: Sequence[str], often: int, seldom: int) -> str:
    words = [*frequent] * often + [*others] * seldom
    random.shuffle(words)
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def _common(units: int, random: Random, tokens: int) -> Example:
    """Make an example of common words, after a short solved one; `units` is the number of places of infrequent words."""
    often, seldom = (30, 3) if tokens >= LONG else (6, 1)
    size, shown_often, shown_seldom = (40, 10, 3) if tokens >= LONG else (20, 3, 1)
    order = "Below is a numbered list of words, some of which appear more often than others. Remember those.\n\n"
    ask = "\n\nQuestion: What are the 10 words that appear most often in the list?"
    begin = "Answer: The 10 words that appear most often in the list are:"
    shown = random.sample(WORDS, size)
    example = _listed(random, shown[:10], shown[10:], shown_often, shown_seldom)
    solution = " ".join(f"{i}. {word}" for i, word in enumerate(shown[:10], 1))
    words = random.sample(WORDS, len(WORDS))
    # If there are not enough words, the infrequent ones are repeated more often, but less often than the frequent ones.
    others = words[10 : 10 + min(len(words) - 10, -(-units // seldom))]
    seldom = min(max(seldom, units // len(others)), often // 2)
    text = _listed(random, words[:10], others, often, seldom)
    return Example(f"{order}{example}{ask} {begin} {solution}\n\n{order}{text}", ask, begin, tuple(words[:10]))


def _frequent(units: int, random: Random, tokens: int) -> Example:
    """Make an example of frequent coded words by a power law of exponent 2, with dots as the most frequent."""
    coded = _distinct(lambda r: "".join(r.choices(string.ascii_lowercase, k=6)), random, max(8, tokens // 50))
    counts = [int(units * 6 / 3.141592653589793**2 / rank**2) for rank in range(1, len(coded) + 2)]
    words = [word for word, count in zip(["...", *coded], counts, strict=True) for _ in range(count)]
    random.shuffle(words)
    return Example(
        "Read the following coded text and count how often each coded word appears. Find the three most frequent ones.\n\n"
        + " ".join(words),
        "\n\nQuestion: Do not explain anything, and leave the dots out. What are the three most frequent coded words?",
        "Answer: The three most frequent words of the coded text are:",
        tuple(coded[:3]),
    )


RULER: dict[str, Task] = {
    "single_1": Task(_needles("line"), 24, 1, "one number in a repeated line"),
    "single_2": Task(_needles("prose"), 24, 1, "one number in prose"),
    "single_3": Task(_needles("prose", kind="UUID"), 56, 1, "one UUID in prose"),
    "multikey_1": Task(_needles("prose", keys=4), 24, 4, "one of four numbers"),
    "multikey_2": Task(_needles("needles"), 24, 1, "one number among such lines"),
    "multikey_3": Task(_needles("needles", kind="UUID"), 56, 1, "one UUID among such lines"),
    "multivalue": Task(_needles("prose", values=4), 64, 4, "four numbers of one name"),
    "multiquery": Task(_needles("prose", keys=4, asked=4), 64, 4, "four numbers of four names"),
    "vt": Task(_track, 30, 5, "variables along a chain"),
    "cwe": Task(_common, 100, 10, "ten common words"),
    "fwe": Task(_frequent, 40, 60, "three frequent words"),
}
"""RULER's synthetic tasks by name, without its two of questions and answers."""


def needle(depth: float) -> Task:
    """Make a task with a number in prose at a depth, 0 (the beginning of the text) to 1 (its end)."""
    return Task(_needles("prose", depth=depth), 24, 1, "one number in prose, by depth")


@dataclass(frozen=True)
class Prompt:
    """A tokenised example.

    Attributes:
        ids: all tokens, the beginning of the answer included.
        behind: number of tokens after the text: the question, the chat template's tokens, and the answer's beginning.
        answers: see `Example`.
    """

    ids: list[int]
    behind: int
    answers: tuple[str, ...]


def fit(task: Task, tokenizer: Any, tokens: int, seed: str) -> Prompt:
    """Make the longest example that fits, with its answer, in a number of tokens.

    Args:
        task: what is hidden.
        tokenizer: a tokenizer of transformers; where it has a chat template the question is asked in a chat.
        tokens: length of the prompt and the answer together.
        seed: words that seed the example.

    Raises:
        ValueError: if not even the shortest example fits.
    """

    def build(units: int) -> Prompt:
        return _prompt(task.make(units, Random(seed), tokens), tokenizer)

    def fits(prompt: Prompt) -> bool:
        return len(prompt.ids) + task.new_tokens <= tokens

    low, best = task.least, build(task.least)
    if not fits(best):
        raise ValueError(f"{tokens} tokens are too few: the shortest text has {len(best.ids)}, and an answer {task.new_tokens}")
    high = low
    while high == low:  # the number of units is doubled until the text is too long
        high = 2 * low
        prompt = build(high)
        if fits(prompt):
            low, best = high, prompt
    while low + 1 < high:
        middle = (low + high) // 2
        prompt = build(middle)
        if fits(prompt):
            low, best = middle, prompt
        else:
            high = middle
    return best


def _prompt(example: Example, tokenizer: Any) -> Prompt:
    content = example.text + example.question
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": content}]
        whole = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) + example.begin
        special = False
    else:
        whole, special = f"{content}\n{example.begin}", True
    ids = tokenizer(whole, add_special_tokens=special, verbose=False)["input_ids"]
    tail = whole[whole.rindex(example.question) :]
    behind = len(tokenizer(tail, add_special_tokens=False, verbose=False)["input_ids"])
    return Prompt(list(ids), min(behind, len(ids) - 1), example.answers)


def score(written: str, answers: Sequence[str]) -> float:
    """Compute the share of the answers that occur in the written text, ignoring case."""
    return sum(answer.lower() in written.lower() for answer in answers) / len(answers)
