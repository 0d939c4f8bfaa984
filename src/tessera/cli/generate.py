"""`tessera generate`: stream text from a model whose cache is Tessera's, and watch the cache grow."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tessera.cli.errors import one_line_errors

if TYPE_CHECKING:
    from torch import Tensor

    from tessera.cache import Cache, CacheReport

#: The default cache.
SPEC = "sink:4 + hqmq:4 + recent:128"
#: Tokens between two lines about bytes where the output is no terminal.
EVERY = 64


def generate(
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="UTF-8 file with the text to continue.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder, GGUF file or hub name of a causal language model.  [default: the demo model]")
    ] = None,
    cache: Annotated[str | None, typer.Option(help=f"Cache specification.  [default: {SPEC}, or that of --from]")] = None,
    saved: Annotated[
        Path | None, typer.Option("--from", help="File of tessera prefill, whose text the prompt continues.")
    ] = None,
    memory: Annotated[
        Path | None,
        typer.Option(help="File of a Tensor Cache for a cache with tc.  [default: the demo model's, with the demo model]"),
    ] = None,
    stats: Annotated[
        Path | None, typer.Option(help="File of key statistics, see tessera stats.  [default: each text's own]")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=1)] = 200,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0: always the likeliest token.", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or float16.  [default: float32 on a CPU, else auto]")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Continue a text, and show how many bytes the cache holds as it grows.

    The text goes to stdout, the bytes to stderr.

    Example:

        tessera generate --prompt "class Stack:" --cache "sink:4 + hqmq:4 + recent:64" --max-new-tokens 300

        tessera generate --prompt-file module.py --cache "sink:4 + window:256 + tc"

        tessera generate --model ./model.gguf --prompt "Once upon a time"

        tessera generate --from book.cache --prompt "In short:"
    """
    from tessera.cli.memories import memory_for
    from tessera.cli.quiet import quiet

    quiet()
    import torch
    from transformers import set_seed

    import tessera
    from tessera import evaluation
    from tessera.evaluation import prefill_file as files
    from tessera.tiers.per_layer import parse

    with one_line_errors():
        if (prompt is None) == (prompt_file is None):
            raise ValueError('give --prompt or --prompt-file, as in --prompt "class Stack:"')
        if saved is not None:
            about = files.read_prefilled(saved)
            if cache is not None and str(parse(cache)) != about.spec:
                raise ValueError(f"{saved} holds a cache of {about.spec!r}, not of {cache!r}; leave --cache out")
            if stats is not None:
                raise ValueError(f"{saved} has its statistics already; leave --stats out")
            cache = about.spec
        cache = SPEC if cache is None else cache
        memory = memory_for(cache, memory, model)
        text = evaluation.read_text([prompt_file])[0] if prompt_file is not None else prompt or ""
        if not text.strip():
            raise ValueError("the prompt is empty")
        source = evaluation.load(model, dtype, device, memory)
        if saved is not None:
            past, _ = files.load_prefilled(saved, source, about)
        else:
            past = tessera.Cache(cache, source.model, stats=stats)
        # A beginning-of-text token must not be in the middle of a text.
        whole = {"add_special_tokens": saved is None}
        inputs = source.tokenizer(text, return_tensors="pt", verbose=False, **whole).to(source.model.device)
        inputs.pop("token_type_ids", None)
        asked = inputs["input_ids"].shape[1]
        if not asked:
            raise ValueError("the prompt has no tokens")
        before = past.get_seq_length()
        if source.context is not None and before + asked + max_new_tokens > source.context:
            behind = f" behind {before:,} that are saved" if before else ""
            raise ValueError(
                f"{asked} tokens of prompt and {max_new_tokens} new ones{behind} are more than the {source.context} that the "
                "model was made for; shorten the prompt or lower --max-new-tokens"
            )
        if before:
            # The mask is for all tokens, those of the saved text included; the ids are the new ones only.
            inputs["attention_mask"] = torch.ones(1, before + asked, dtype=torch.long, device=source.model.device)
    set_seed(seed)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling["temperature"] = temperature
    shown = _Display(source.tokenizer, past)
    with shown, torch.inference_mode():
        source.model.generate(**inputs, past_key_values=past, max_new_tokens=max_new_tokens, streamer=shown, **sampling)
    shown.summary()


class _Display:
    """A streamer for `generate`: text to stdout, and the cache's bytes below it or, without a terminal, to stderr."""

    def __init__(self, tokenizer: Any, cache: Cache) -> None:
        from rich.console import Console
        from rich.live import Live

        self.tokenizer = tokenizer
        self.cache = cache
        self.tokens: list[int] = []
        self.written = 0
        self.generated = 0
        self.status = Console(stderr=True)
        self.live = Live(console=Console(), transient=True, vertical_overflow="visible") if sys.stdout.isatty() else None

    def __enter__(self) -> _Display:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()
        self._write(self._text()[self.written :] + "\n")

    def put(self, value: Tensor) -> None:
        """Receive the prompt, then each new token."""
        new = value.flatten().tolist()
        self.generated += 0 if not self.tokens else len(new)
        self.tokens += new
        text = self._text()
        if self.live:
            from rich.console import Group
            from rich.rule import Rule
            from rich.text import Text

            self.live.update(Group(Text(text), Rule(style="dim"), Text(self._line(self.cache.report()), style="cyan")))
            return
        # A character of several tokens is written when it is complete.
        ready = text if not text.endswith("\ufffd") else text[: self.written]
        self._write(ready[self.written :])
        self.written = len(ready)
        if self.generated and self.generated % EVERY == 0:
            self.status.print(self._line(self.cache.report()), highlight=False, style="cyan")

    def end(self) -> None:
        """Do nothing: `put` writes at once."""

    def _text(self) -> str:
        return self.tokenizer.decode(self.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def _line(self, report: CacheReport) -> str:
        from tessera.evaluation.table import size

        return f"{report.tokens:,} tokens: cache {size(report.nbytes)}, dense {size(report.dense_nbytes)} ({report.gain})"

    def summary(self) -> None:
        """Print what the cache holds at the end, tier by tier."""
        self.status.print(str(self.cache.report()), highlight=False, style="cyan")
