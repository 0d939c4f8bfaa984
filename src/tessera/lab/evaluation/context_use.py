"""Two measurements of whether a model uses its context, neither of which a model with a short memory can pass.

`loss_by_context` scores the same tokens twice, after a long and after a short context. `copy_far_name` defines a
made-up name, reads on for hundreds of tokens, gives the name's beginning and asks for the rest; the control is the same
text without the definition.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

NAME_TOKENS = 8
"""Tokens of a made-up name."""


@dataclass(frozen=True)
class ContextLoss:
    """Mean loss of the same tokens after a long and after a short context."""

    long: float
    """Nats per token with the long context."""
    short: float
    """Nats per token with the short context."""
    long_context: int
    """Tokens of the long context."""
    short_context: int
    """Tokens of the short context."""
    scored: int
    """How many tokens were scored."""

    @property
    def gain(self) -> float:
        """Nats per token that the longer context saves."""
        return self.short - self.long


@torch.no_grad()
def loss_by_context(
    model: Any,
    tokens: Tensor,
    *,
    long_context: int = 1024,
    short_context: int = 128,
    scored: int = 64,
    windows: int = 16,
    batch: int = 4,
) -> ContextLoss:
    """Score the same tokens after ``long_context`` and after only the last ``short_context`` tokens.

    Windows are spread evenly over ``tokens``. Both contexts begin with the first token of ``tokens``, which should be
    the beginning-of-sequence token: without it the short context would also be an unusual one.

    Args:
        model: a causal language model of transformers.
        tokens: int64 (tokens,), beginning-of-sequence token first.
        long_context: tokens before the scored ones in the first measurement.
        short_context: the same in the second.
        scored: tokens scored in each window.
        windows: number of windows.
        batch: windows per forward pass.

    Raises:
        ValueError: if ``tokens`` is too short for one window, or the contexts are not in order.
    """
    if not 1 < short_context < long_context:
        raise ValueError(f"contexts must satisfy 1 < short < long, got {short_context} and {long_context}")
    room = len(tokens) - 1 - (long_context - 1 + scored)
    if room < 0:
        raise ValueError(f"{len(tokens)} tokens are too few for a context of {long_context} and {scored} scored tokens")
    starts = [1 + round(index * room / max(1, windows - 1)) for index in range(windows)]
    length = long_context - 1 + scored
    rows = torch.stack([tokens[start : start + length] for start in starts]).to(model.device)
    bos = tokens[:1].to(model.device).expand(windows, 1)

    def loss(context: int) -> float:
        total = 0.0
        for begin in range(0, windows, batch):
            part = rows[begin : begin + batch, length - scored - (context - 1) :]
            ids = torch.cat((bos[begin : begin + batch], part), dim=1)
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits[:, -scored:]
            total += float(cross_entropy(logits.float().flatten(0, 1), ids[:, -scored:].flatten(), reduction="sum"))
        return total / (windows * scored)

    return ContextLoss(loss(long_context), loss(short_context), long_context, short_context, windows * scored)


@dataclass(frozen=True)
class CopyResult:
    """How well a made-up name is completed, defined far back or not at all. Means over the trials."""

    defined: float
    """Mean log-probability (nats per token) of the rest of the name when its definition was in the context."""
    control: float
    """The same when it was not."""
    top1_defined: float
    """Share of the rest's tokens that were the model's first choice, with the definition."""
    top1_control: float
    """The same without it."""
    distance: int
    """Tokens between the definition and the use."""
    trials: int
    """Names tried."""

    @property
    def gain(self) -> float:
        """Nats per token that the definition is worth."""
        return self.defined - self.control


def made_up_name(rng: random.Random) -> str:
    """Return an identifier of two invented words, such as ``dovuki_razemo``: pronounceable, and in no source file."""
    words = ("".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3)) for _ in range(2))
    return "_".join(words)


@torch.no_grad()
def copy_far_name(
    model: Any,
    tokenizer: Any,
    filler: Tensor,
    *,
    distance: int = 500,
    lead: int = 2,
    trials: int = 16,
    batch: int = 8,
    seed: int = 0,
) -> CopyResult:
    """Define a made-up name, read ``distance`` tokens of other code, give the name's first tokens, score the rest.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer; must have a beginning-of-sequence token.
        filler: int64 (tokens,) of ordinary code without special tokens; each trial takes another part of it.
        distance: tokens of filler between the definition and the use.
        lead: tokens of the name that are given.
        trials: names tried.
        batch: sequences per forward pass.
        seed: seed of the names.

    Raises:
        ValueError: if the filler is shorter than one trial needs.
    """
    room = len(filler) - distance
    if room < 0:
        raise ValueError(f"the filler has {len(filler)} tokens, fewer than the distance of {distance}")
    rng = random.Random(seed)

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    defined, control = [], []
    for trial in range(trials):
        while True:  # until the name has as many tokens as the others, so that the trials form one batch
            name = made_up_name(rng)
            ids = encode(f" {name}")
            if (
                len(ids) == NAME_TOKENS
                and encode(f"def {name}")[-NAME_TOKENS:] == ids
                and encode(f"x = {name}")[-NAME_TOKENS:] == ids
            ):
                break
        start = round(trial * room / max(1, trials - 1))
        middle = filler[start : start + distance].tolist()
        head = encode("\n\ndef") + ids + encode("(items):\n    return sorted(items)\n\n\n")
        blank = encode("\n\ndef") + encode(" collect") + encode("(items):\n    return sorted(items)\n\n\n")
        use = encode("\n\nresult =") + ids
        bos = tokenizer.bos_token_id
        defined.append([bos, *head, *middle, *use])
        control.append([bos, *blank, *middle, *use])

    def score(rows: list[list[int]]) -> tuple[float, float]:
        logs, hits = 0.0, 0.0
        rest = NAME_TOKENS - lead
        for begin in range(0, trials, batch):
            ids = torch.tensor(rows[begin : begin + batch], device=model.device)
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits[:, -rest:].float()
            target = ids[:, -rest:]
            logs += float(log_softmax(logits, dim=-1).gather(-1, target[..., None]).sum())
            hits += float((logits.argmax(-1) == target).sum())
        return logs / (trials * rest), hits / (trials * rest)

    with_definition, without = score(defined), score(control)
    return CopyResult(with_definition[0], without[0], with_definition[1], without[1], distance, trials)
