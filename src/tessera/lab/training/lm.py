"""Training of a `tessera.lab.models.GPT` on text from scratch: tokenizer, data, training, and export for transformers."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState

from tessera.files import atomic_path, read_utf8
from tessera.lab.models.small_gpt import GPT, GPTConfig, read_attention
from tessera.lab.training.checkpoints import RunState, claim
from tessera.lab.training.corpus import Corpus, SourceFile, training_files
from tessera.lab.training.demo import BOS_ID, EOS_ID, export, held_out_loss, shrink_branches, train_tokenizer
from tessera.lab.training.log import plot_log
from tessera.lab.training.loop import Moment, train
from tessera.lab.training.schedule import LoopConfig, Phase

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HELD_OUT = 20
"""The share held out at the end of each file: one character in so many."""

MEASURED = 200_000
"""Number of characters of held-out text that the loss is measured on."""

VOCABULARY = 2048
"""Default vocabulary size of a tokenizer that is trained on files."""


SCHEDULE = LoopConfig(phases=(Phase(1.0, 512, 16),), minutes=20, mixed_precision="no")
"""The default configuration."""


@dataclass(frozen=True)
class LmConfig:
    """The shape of a language model and how it is trained."""

    attention: str = "dense"
    """See `tessera.lab.models.small_gpt.GPTConfig`."""
    memory: dict[str, Any] | None = None
    """Fields of `TensorCacheConfig` for "tc"."""
    hidden: int = 256
    """Width of the residual stream."""
    layers: int = 6
    """Decoder layers."""
    heads: int = 4
    """Query heads."""
    kv_heads: int = 2
    """Key and value heads."""
    head_dim: int = 64
    """Width of a head."""
    vocabulary: int | None = None
    """Entries of a tokenizer that is trained on the data. None: `VOCABULARY`; without data, the demo model's tokenizer, which
    was made for what is read then."""
    loop: LoopConfig = SCHEDULE
    """When to train on what, and how fast."""

    def __post_init__(self) -> None:
        for name in ("hidden", "layers", "heads", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} does not divide heads {self.heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, for rotary positions; got {self.head_dim}")
        if self.vocabulary is not None and not 258 <= self.vocabulary <= 1 << 16:
            raise ValueError(f"vocabulary must lie between 258, which are all bytes, and 65536; got {self.vocabulary}")
        bounded = any(part is not None for part in read_attention(self.attention, self.memory))
        if not bounded and any(phase.segments > 1 for phase in self.loop.phases):
            raise ValueError(
                f"{self.attention!r} has no bounded state to keep from segment to segment; choose a window, such as "
                "'window:256 + tc', or 'infini:64'"
            )

    @property
    def context(self) -> int:
        """Number of tokens of the longest document in training, all segments included."""
        return max(phase.length for phase in self.loop.phases)


def build_lm(config: LmConfig, vocabulary: int) -> GPT:
    """Return the untrained model, float32, the same for the same seed."""
    with torch.random.fork_rng([]):
        torch.manual_seed(config.loop.seed)
        model = GPT(
            GPTConfig(
                attention=config.attention,
                memory=config.memory,
                vocab_size=vocabulary,
                hidden_size=config.hidden,
                intermediate_size=64 * math.ceil(config.hidden / 24),
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.kv_heads,
                head_dim=config.head_dim,
                max_position_embeddings=config.context,
                tie_word_embeddings=True,
                bos_token_id=BOS_ID,
                eos_token_id=EOS_ID,
                pad_token_id=EOS_ID,
            )
        )
    shrink_branches(model, config.layers)
    return model


def prepare_lm(vocabulary: int | None, data: Sequence[Path], out: Path) -> tuple[Tokenizer, Corpus, str]:
    """Return the tokenizer, the corpus and the held-out text of a run, made on the first call and read from ``out`` afterwards.

    Args:
        vocabulary: see `LmConfig`.
        data: text files; none: installed Python source, and the modules held out of it.
        out: the run's directory.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a file is empty or no UTF-8 text.
    """
    from tokenizers import Tokenizer

    from tessera.models import demo_path, heldout_text

    words, corpus, rest = out / "tokenizer.json", out / "corpus", out / "held_out.txt"
    if words.is_file() and rest.is_file() and (corpus / "corpus.json").is_file():
        return Tokenizer.from_file(str(words)), Corpus(corpus), rest.read_text(encoding="utf-8")
    if data:
        whole = [(path.name, read_utf8(path)) for path in data]
        files = [SourceFile("data", name, text[: len(text) - len(text) // HELD_OUT]) for name, text in whole]
        held_out = "\n\n".join(text[len(text) - len(text) // HELD_OUT :] for _, text in whole)
    else:
        files, held_out = list(training_files()), heldout_text(MEASURED)
    if not data and vocabulary is None:
        tokenizer = Tokenizer.from_file(str(demo_path() / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer((file.text for file in files), vocabulary or VOCABULARY)
    built = Corpus.build(corpus, files, tokenizer, BOS_ID, EOS_ID)
    with atomic_path(words) as temporary:
        tokenizer.save(str(temporary))
    with atomic_path(rest) as temporary:
        temporary.write_text(held_out[:MEASURED], encoding="utf-8")
    return tokenizer, built, held_out[:MEASURED]


def train_lm(config: LmConfig, data: Sequence[Path], out: Path, *, resume: bool = True, stop_at: int | None = None) -> RunState:
    """Train a language model in ``out``, exporting it to ``out/model`` at every checkpoint.

    Args:
        config: shape and schedule.
        data: see `prepare_lm`.
        out: the run's directory: tokenizer, corpus, checkpoints, log, picture, model.
        resume: go on with the run found there; otherwise it is deleted first.
        stop_at: stop after this many steps, as an interruption would.

    Raises:
        FileNotFoundError: if a file is absent.
        ValueError: for a file without text, text that is too short, or a directory with a run of another recipe.
    """
    processes = PartialState(cpu=not torch.cuda.is_available())
    with processes.main_process_first():
        if processes.is_main_process and not resume:
            forget(out)
        tokenizer, corpus, held_out = prepare_lm(config.vocabulary, data, out)
        recipe = asdict(replace(config, loop=replace(config.loop, steps=None, minutes=1.0)))  # the budget may change
        claim(out, {**recipe, "data": [str(path) for path in data]})
    model = build_lm(config, tokenizer.get_vocab_size())
    tokens = torch.tensor(tokenizer.encode(held_out).ids)

    def measure(moment: Moment) -> dict[str, float]:
        trained: Any = moment.model
        export(trained, tokenizer, out / "model", dtype=torch.float32)
        if len(tokens) < 2:
            return {}
        loss = held_out_loss(trained, tokens.to(trained.device), config.context)
        return {"held_out_loss": round(loss, 4), "held_out_perplexity": round(math.exp(loss), 4)}

    state = train(model, corpus.sample, config.loop, out, resume=resume, stop_at=stop_at, on_checkpoint=measure)
    if processes.is_main_process:
        plot_log(out / "log.jsonl", out / "loss.png", f"Training {config.attention}")
    return state


def forget(out: Path) -> None:
    """Delete what `train_lm`, `train_recall` and `train_vision` leave in a directory, and nothing else."""
    for name in ("corpus", "checkpoints", "tensorboard", "model"):
        shutil.rmtree(out / name, ignore_errors=True)
        pictures = ("image.json", "image.png", "video.json", "video.png")
    for name in ("recipe.json", "tokenizer.json", "held_out.txt", "log.jsonl", "loss.png", "recall.json", *pictures):
        (out / name).unlink(missing_ok=True)
