"""`lm-evaluation-harness` with Tessera's caches: the model type `tessera`.

Other packages cannot register a model type with the harness's command, so the command is started through this module, which
registers the type and leaves everything else to the harness:

    tessera lm-eval --model tessera --model_args pretrained=MODEL,cache="sink:4 + hqmq:4 + recent:128" --tasks lambada_openai

In Python, importing this module is enough: `lm_eval.simple_evaluate(model="tessera", model_args={...})`.

The harness computes log-likelihoods in one call of the model, in which no cache is ever read. Here a text goes through the
cache as in generation: what stands before the tokens that are scored is read first, `chunk` tokens a call, then the tokens that
are scored, `chunk` a call. Tokens of a call see each other exactly and everything older through the cache. A prompt is read the
same way before its continuation is generated. Calls are counted from the first token that is scored or generated, so that an
answer does not depend on the padding of its batch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

import tessera
from tessera.cache.report import CacheReport
from tessera.codecs.channel_stats import load_stats
from tessera.tiers.per_layer import parse

#: A request of the harness: what it is cached by, the tokens of the context, and those to be scored behind it.
Request = tuple[Any, list[int], list[int]]


@register_model("tessera")
class TesseraLM(HFLM):
    """The harness's `hf` for causal models, with keys and values in a `tessera.Cache`.

    Args:
        pretrained: as for `hf`: a folder, a name on the hub, or a model.
        cache: specification of the cache, such as "sink:4 + hqmq:4 + recent:128".
        chunk: tokens of a call while a text is read; one at least.
        memory: file of a Tensor Cache for a specification with "tc".
        stats: file of key statistics, see `tessera stats`; None: each text's own.
        rest: what `hf` takes.

    Raises:
        ValueError: for a specification with a mistake, or a model that it cannot serve.
    """

    def __init__(
        self,
        pretrained: Any,
        cache: str = "dense",
        chunk: int = 64,
        memory: str | None = None,
        stats: str | None = None,
        **rest: Any,
    ) -> None:
        self.spec = parse(cache)
        if not isinstance(chunk, int) or chunk < 1:
            raise ValueError(f"chunk must be a whole number of at least 1, got {chunk!r}")
        if self.spec.tensor_cache and memory is None:
            raise ValueError(f"{cache!r} has a Tensor Cache; name its file with memory=...")
        super().__init__(pretrained, **rest)
        if self.backend != "causal":
            raise ValueError("the model type tessera is for causal language models; use hf for this one")
        if memory is not None:
            tessera.load_memory(self.model, memory)
        self.chunk = chunk
        self.stats = None if stats is None else load_stats(stats)
        #: The report of the cache that held the most tokens so far.
        self.report: CacheReport | None = None
        self._new_cache()  # refuses a model that cannot be served before anything is read

    def _new_cache(self) -> tessera.Cache:
        return tessera.Cache(self.spec, self.model, stats=self.stats)

    def _note(self, cache: tessera.Cache) -> None:
        """Keep the report of the longest cache."""
        if self.report is None or cache.get_seq_length() > self.report.tokens:
            self.report = cache.report()

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation behind its context, and whether each of its tokens is the likeliest."""
        longest = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        batch = self.batch_size
        if batch == "auto":
            batch = override_bs or (self._detect_batch_size([requests[i] for i in longest]) if requests else 1)
        found: dict[int, tuple[float, bool]] = {}
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        for start in range(0, len(longest), batch):
            rows = longest[start : start + batch]
            for i, answer in zip(rows, self._score([requests[i] for i in rows]), strict=True):
                found[i] = answer
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
            bar.update(len(rows))
        bar.close()
        return [found[i] for i in range(len(requests))]

    def _score(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """`_loglikelihood_tokens` for one batch."""
        before: dict[tuple[int, ...], int] = {}  # contexts that several requests share are read once
        own: list[int] = []
        read: list[list[int]] = []
        for _, context, continuation in requests:
            if not continuation:
                raise ValueError("a request has no tokens to score behind its context")
            tokens = (context + continuation)[-(self.max_length + 1) :]
            if len(continuation) >= len(tokens):
                raise ValueError(f"{len(continuation)} tokens to score do not fit the model's {self.max_length}")
            # The token before the first one that is scored predicts it.
            cut = len(tokens) - len(continuation) - 1
            own.append(before.setdefault(tuple(tokens[:cut]), len(before)))
            read.append(tokens[cut:-1])
        with torch.inference_mode(), self._precision():
            cache = self._new_cache()
            width = max(map(len, before))
            seen = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in before], device=self.device)
            ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in before], device=self.device)
            self._read(ids, seen, cache)
            if width and own != list(range(len(before))):
                cache.batch_select_indices(torch.tensor(own))
            longest = max(map(len, read))
            new = torch.tensor([row + [0] * (longest - len(row)) for row in read], device=self.device)
            real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in read], device=self.device)
            seen = torch.cat((seen[own].long(), real), dim=1)
            scores: list[Tensor] = []
            for begin, end in _parts(longest, self.chunk, self.chunk):
                logits = self._call(new[:, begin:end], seen[:, : width + end], cache)
                wanted = torch.tensor([(row[2] + [0] * longest)[begin:end] for row in requests], device=self.device)
                # As `hf` computes it, in the dtype of the logits unless softmax_dtype says otherwise.
                logp = logits.log_softmax(-1, dtype=self.softmax_dtype)
                right = logp.argmax(-1) == wanted
                scores.append(torch.stack((logp.gather(-1, wanted[..., None])[..., 0].double(), right.double())))
            self._note(cache)
        of_rows = torch.cat(scores, dim=-1).cpu()
        lengths = [len(row) for row in read]
        return [(float(of_rows[0, i, :n].sum()), bool(of_rows[1, i, :n].all())) for i, n in enumerate(lengths)]

    def _read(self, ids: Tensor, seen: Tensor, cache: tessera.Cache) -> None:
        """Fill an empty cache; ids and seen: (batch, tokens), padded on the left. Calls are counted from the right end."""
        width = ids.shape[1]
        for begin, end in _parts(width, width % self.chunk or self.chunk, self.chunk):
            self._call(ids[:, begin:end], seen[:, :end], cache, logits=1)

    def _call(self, ids: Tensor, seen: Tensor, cache: tessera.Cache, logits: int = 0) -> Tensor:
        """Logits for new tokens; ids: (batch, tokens), seen: (batch, tokens so far), 0 for padding."""
        places = (seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        more: dict[str, Any] = {"logits_to_keep": logits} if logits else {}
        found: Tensor = self.model(
            input_ids=ids, attention_mask=seen, position_ids=places, past_key_values=cache, use_cache=True, **more
        ).logits
        return found

    def _precision(self) -> torch.autocast:
        wanted = self.mixed_precision_dtype
        return torch.autocast(device_type=self.device.type, dtype=wanted, enabled=wanted is not None)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], attention_mask: Tensor, **options: Any
    ) -> Tensor:
        """Generate as `hf` does, after reading all but the prompt's last token; context and attention_mask: (batch, tokens)."""
        cache = self._new_cache()
        with torch.inference_mode():
            with self._precision():
                self._read(context[:, :-1], attention_mask[:, :-1], cache)
            copies = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
            if copies > 1 and context.shape[1] > 1:
                cache.batch_repeat_interleave(copies)
            made: Tensor = super()._model_generate(
                context, max_length, stop, attention_mask=attention_mask, past_key_values=cache, **options
            )
        self._note(cache)
        return made

    def get_model_info(self) -> dict[str, Any]:
        """Return the harness's information on the model, with the cache and the report of the longest one."""
        found: dict[str, Any] = {**super().get_model_info(), "cache": str(self.spec), "cache_chunk": self.chunk}
        if self.report is not None:
            found["cache_tokens"] = self.report.tokens
            found["cache_bits_per_element"] = self.report.bits_per_element
            found["cache_compression"] = self.report.compression
        return found


def _parts(length: int, first: int, rest: int) -> list[tuple[int, int]]:
    """Cut [0, length) into a part of `first` and parts of `rest`; no parts if it is empty."""
    ends = [*range(first, length, rest), length] if length else []
    return list(zip([0, *ends], ends, strict=False))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the harness's command `lm_eval` with the model type `tessera` known to it.

    Args:
        arguments: arguments of the command; None: those of this process.
    """
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *(sys.argv[1:] if arguments is None else arguments)]
    cli_evaluate()


if __name__ == "__main__":
    main()
