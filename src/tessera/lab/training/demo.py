"""The recipe of the demo model: a small Llama trained from scratch on Python source, on two CPU cores in under an hour."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tessera.files import atomic_path
from tessera.lab.training.checkpoints import RunState, claim
from tessera.lab.training.corpus import PACKAGES, Corpus, SourceFile, training_files
from tessera.lab.training.log import plot_log, summarise_log
from tessera.lab.training.loop import Moment, train
from tessera.lab.training.schedule import LoopConfig, Phase
from tessera.models import heldout_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOS, EOS = "<|bos|>", "<|eos|>"
BOS_ID, EOS_ID = 0, 1  # special tokens come first in the vocabulary, in the order given to the trainer


SCHEDULE = LoopConfig(
    phases=(
        Phase(until=0.08, sequence=256, batch=32, micro_batch=16),
        Phase(until=0.6, sequence=512, batch=16, micro_batch=8),
        Phase(until=0.8, sequence=1024, batch=8, micro_batch=4),
        Phase(until=1.0, sequence=2048, batch=8, micro_batch=2),
    ),
    minutes=40,
)
"""Short sequences while the model learns words, long ones while it learns to use its context."""


@dataclass(frozen=True)
class DemoConfig:
    """The shape of the demo model and how it is trained."""

    vocabulary: int = 2048
    """Entries of the byte-level BPE; small, so that the embeddings stay a tenth of the model."""
    hidden: int = 256
    """Width of the residual stream."""
    layers: int = 6
    """Decoder layers."""
    heads: int = 4
    """Query heads."""
    kv_heads: int = 2
    """Key and value heads."""
    head_dim: int = 64
    """Width of a head: that of many larger models, so that what is measured here about caches holds for them."""
    intermediate: int = 704
    """Width of the MLP."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    context: int = 2048
    """Longest sequence trained on; recorded in the model's configuration."""
    packages: tuple[str, ...] = tuple(PACKAGES)
    """Packages read beside the standard library."""
    files: int | None = None
    """Read only this many files, for a quick check; ``None`` reads all."""
    tokenizer_bytes: int = 16_000_000
    """How much text the tokenizer is trained on, spread over the corpus."""
    loop: LoopConfig = SCHEDULE
    """When to train on what, and how fast."""

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} does not divide heads {self.heads}")
        longest = max(phase.sequence for phase in self.loop.phases)
        if longest > self.context:
            raise ValueError(f"a phase has sequences of {longest} tokens, beyond the context of {self.context}")


TINY = DemoConfig(
    vocabulary=512,
    hidden=64,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=32,
    intermediate=128,
    context=128,
    packages=(),
    files=40,
    loop=LoopConfig(
        phases=(
            Phase(until=0.5, sequence=64, batch=4, micro_batch=2),
            Phase(until=1.0, sequence=128, batch=2, micro_batch=2),
        ),
        steps=8,
        warmup_steps=2,
        log_every=1,
    ),
)
"""A tiny recipe of a few seconds, to check that the machinery works."""


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE that decodes to exactly the text it was given, and starts every text with ``<|bos|>``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]),
        ]
    )
    return tokenizer


def _spread(files: list[SourceFile], size: int) -> list[str]:
    """Return about ``size`` characters of whole files, evenly spread, the standard library always included."""
    standard = [file.text for file in files if file.source == "stdlib"]
    others = [file.text for file in files if file.source != "stdlib"]
    room = size - sum(map(len, standard))
    stride = max(1, math.ceil(sum(map(len, others)) / max(room, 1)))
    return standard + others[::stride]


def build_model(config: DemoConfig) -> nn.Module:
    """Return the untrained model, float32; the residual branches start smaller the more of them there are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.loop.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.context,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
            initializer_range=0.02,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
            pad_token_id=EOS_ID,
        )
    )
    shrink_branches(model, config.layers)
    return model


@torch.no_grad()
def shrink_branches(model: nn.Module, layers: int) -> None:
    """Let the residual branches of an untrained Llama start smaller the more of them there are."""
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.mul_(1 / math.sqrt(2 * layers))


@torch.no_grad()
def held_out_loss(model: nn.Module, tokens: Tensor, context: int) -> float:
    """Return the mean loss in nats of a stream cut into windows of ``context`` tokens, each after its own start token.

    Args:
        model: a causal language model.
        tokens: int64 (tokens,), the first of which is the beginning-of-sequence token.
        context: tokens per window.
    """
    bos = tokens[:1]
    total, count = 0.0, 0
    for start in range(1, len(tokens), context - 1):
        window = torch.cat((bos, tokens[start : start + context - 1]))[None]
        logits = model(input_ids=window[:, :-1], use_cache=False).logits
        total += float(nn.functional.cross_entropy(logits[0].float(), window[0, 1:], reduction="sum"))
        count += window.shape[1] - 1
    return total / count


def export(
    model: nn.Module,
    tokenizer: Tokenizer,
    target: Path,
    weights: dict[str, Tensor] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write the model and its tokenizer as `transformers` reads them, replacing what is there.

    Args:
        model: the model, whose weights are left as they are.
        tokenizer: its tokenizer.
        target: the directory to write; a README in it is kept.
        weights: values by parameter name to write in place of the model's own.
        dtype: dtype of what is written.
    """
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    source: Any = model
    config = type(source.config).from_dict(source.config.to_dict())
    config.dtype = dtype
    config._attn_implementation = None
    copy = type(source)(config)
    copy.load_state_dict(weights if weights is not None else dict(source.named_parameters()), strict=False)
    copy.tie_weights()
    copy = copy.to(dtype)
    copy.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=EOS_ID)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    copy.save_pretrained(temporary)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=source.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(temporary)
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(temporary.iterdir()):
        file.chmod(0o644)  # safetensors writes files that only their owner may read
        file.replace(target / file.name)
    temporary.rmdir()


def prepare(config: DemoConfig, out: Path) -> tuple[Tokenizer, Corpus]:
    """Return the tokenizer and the corpus of a run, made on the first call and read from ``out`` afterwards."""
    from tokenizers import Tokenizer

    vocabulary, data = out / "tokenizer.json", out / "corpus"
    if vocabulary.is_file() and (data / "corpus.json").is_file():
        return Tokenizer.from_file(str(vocabulary)), Corpus(data)
    files = list(islice(training_files(config.packages), config.files))
    tokenizer = train_tokenizer(_spread(files, config.tokenizer_bytes), config.vocabulary)
    with atomic_path(vocabulary) as temporary:
        tokenizer.save(str(temporary))
    return tokenizer, Corpus.build(data, files, tokenizer, BOS_ID, EOS_ID)


def train_demo(
    config: DemoConfig,
    out: Path,
    *,
    resume: bool = True,
    target: Path | None = None,
    evaluate_bytes: int = 300_000,
    stop_at: int | None = None,
) -> RunState:
    """Train the demo model in ``out``, exporting it at every checkpoint.

    Before the learning rate has fallen, the averaged weights are exported, which are better then; at the end the
    weights themselves.

    Args:
        config: the recipe.
        out: the run's directory: corpus, tokenizer, checkpoints, log, and the exported ``model``.
        resume: continue the run found there; otherwise everything in ``out`` is deleted first.
        target: a second place to export to, such as the package's own.
        evaluate_bytes: how much held-out text the loss is measured on at each checkpoint. Nothing is chosen by it.
        stop_at: stop after this many steps, as an interruption would.

    Returns:
        Steps, tokens and seconds of the run.

    Raises:
        FileNotFoundError: if the standard library's source is absent.
        ValueError: if ``out`` holds a run of another recipe.
    """
    from tessera.lab.training.causal_attention import register

    if not resume:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    # The budget may differ in a resumed run.
    claim(out, asdict(replace(config, loop=replace(config.loop, steps=None, minutes=1.0))))
    tokenizer, corpus = prepare(config, out)
    model = build_model(replace(config, vocabulary=tokenizer.get_vocab_size()))
    name = register()
    text = heldout_text(evaluate_bytes)
    tokens = torch.tensor(tokenizer.encode(text).ids)
    nats_to_bits_per_byte = (len(tokens) - 1) / math.log(2) / len(text.encode())
    evaluated = build_model(replace(config, vocabulary=tokenizer.get_vocab_size())).eval()

    def measure(moment: Moment) -> dict[str, float]:
        final = moment.progress >= 1
        weights = dict(moment.model.named_parameters()) if final else moment.average
        evaluated.load_state_dict(weights, strict=False)
        for place in (out / "model", target):
            if place is not None:
                export(evaluated, tokenizer, place)
        with torch.autocast("cpu", torch.bfloat16):
            loss = held_out_loss(evaluated, tokens, 1024)
        return {
            "held_out_loss": round(loss, 4),
            "held_out_perplexity": round(math.exp(loss), 4),
            "held_out_bits_per_byte": round(loss * nats_to_bits_per_byte, 4),
        }

    trained: Any = model
    trained.config.use_cache = False
    trained.set_attn_implementation(name)
    state = train(model, corpus.sample, config.loop, out, resume=resume, stop_at=stop_at, on_checkpoint=measure)
    plot_log(out / "log.jsonl", out / "loss.png", "Training the demo model")
    with atomic_path(out / "summary.json") as temporary:
        temporary.write_text(json.dumps(summarise_log(out / "log.jsonl"), indent=0) + "\n")
    return state
