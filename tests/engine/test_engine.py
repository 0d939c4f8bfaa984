"""vLLM with packed pages: the optimisations of an engine change no token.

Each test compares an engine that uses one feature with the same engine without it. Numbers are float32, and sums are computed
in another order if other tokens are in the batch, so if two tokens are almost equally likely, either is accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from engine_fixtures import SPEC, Answer, ask, counter, engine, random_stats

from tessera.codecs.channel_stats import save_stats

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def usual(demo: Path, prompts: list[list[int]]) -> list[Answer]:
    """Return the answers of an engine without batching, chunked prefill and prefix caching."""
    with engine(demo, max_num_seqs=1) as llm:
        return [ask(llm, [prompt], logprobs=0, prompt_logprobs=0)[0] for prompt in prompts]


def same(got: Sequence[Answer], wanted: Sequence[Answer]) -> None:
    assert [answer.tokens for answer in got] == [answer.tokens for answer in wanted]


def test_requests_of_different_lengths_in_one_batch(demo: Path, prompts: list[list[int]], usual: list[Answer]) -> None:
    with engine(demo) as llm:
        same(ask(llm, prompts), usual)


def test_a_prompt_in_chunks(demo: Path, prompts: list[list[int]], usual: list[Answer]) -> None:
    with engine(demo, max_num_batched_tokens=90) as llm:
        same(ask(llm, prompts), usual)


def test_a_prefix_that_is_shared(demo: Path, prompts: list[list[int]], usual: list[Answer]) -> None:
    with engine(demo, enable_prefix_caching=True) as llm:
        same(ask(llm, prompts), usual)
        again = ask(llm, prompts)
        same(again, usual)
        # Whole blocks of 128, except the last token, which must be computed.
        assert [answer.shared for answer in again] == [(len(p) - 1) // 128 * 128 for p in prompts]


def test_continuations_of_one_prompt_share_its_pages(demo: Path, prompts: list[list[int]]) -> None:
    options = {"n": 3, "temperature": 1.0, "seed": 7, "max_tokens": 90}
    from vllm import SamplingParams

    found = []
    for sharing in (False, True):
        with engine(demo, enable_prefix_caching=sharing) as llm:
            out = llm.generate([{"prompt_token_ids": prompts[6]}] * 2, SamplingParams(**options), use_tqdm=False)
            found.append([list(one.token_ids) for request in out for one in request.outputs])
    assert found[0] == found[1]


def test_requests_that_are_preempted(demo: Path, prompts: list[list[int]]) -> None:
    """Five requests grow from one block to four; the pool has space for their beginnings only."""
    with engine(demo) as llm:
        wanted = ask(llm, prompts[:5], tokens=300)
    for sharing in (False, True):
        with engine(demo, num_gpu_blocks_override=39, enable_prefix_caching=sharing, max_model_len=512) as llm:
            same(ask(llm, prompts[:5], tokens=300), wanted)
            assert counter(llm, "num_preemptions") > 0


def test_tokens_that_are_drafted(demo: Path, prompts: list[list[int]], usual: list[Answer]) -> None:
    drafting = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 3}
    with engine(demo, apart=True, speculative_config=drafting) as llm:
        same(ask(llm, prompts), usual)
        drafted, accepted = counter(llm, "spec_decode_num_draft_tokens"), counter(llm, "spec_decode_num_accepted_tokens")
    assert 0 < accepted < drafted


def test_all_at_once(demo: Path, prompts: list[list[int]]) -> None:
    drafting = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    options = {"speculative_config": drafting, "enable_prefix_caching": True, "max_num_batched_tokens": 150}
    with engine(demo) as llm:
        wanted = ask(llm, prompts[:5], tokens=300)
    with engine(demo, apart=True, num_gpu_blocks_override=39, max_model_len=512, **options) as llm:
        same(ask(llm, prompts[:5], tokens=300), wanted)
        same(ask(llm, prompts[4::-1], tokens=300), wanted[::-1])
        assert counter(llm, "num_preemptions") > 0


def test_heads_on_two_devices(demo: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    """Each process has one of the two key heads, so sums over both are computed in another order than in one process.

    A number may thus be rounded to another code, and later results may differ by as much as quantisation changes them.
    """
    torch.manual_seed(0)
    save_stats(random_stats(6, 2, 64), tmp_path / "stats.safetensors")
    settings = {"tessera": SPEC, "tessera_stats": str(tmp_path / "stats.safetensors")}
    with engine(demo, additional_config=settings) as llm:
        alone = ask(llm, prompts, logprobs=0, prompt_logprobs=0)
    with engine(demo, apart=True, tensor_parallel_size=2, additional_config=settings) as llm:
        got = ask(llm, prompts, logprobs=0, prompt_logprobs=0)
    for one, wanted, prompt in zip(got, alone, prompts, strict=True):
        n = len(prompt) - 1
        difference = (one.logprobs[:n] - wanted.logprobs[:n]).abs()
        assert difference[:63].max() < 1e-4  # nothing is quantised yet
        assert difference.mean() < 0.05
    assert sum(one.tokens == wanted.tokens for one, wanted in zip(got, alone, strict=True)) >= len(alone) - 2


def test_a_model_that_is_compiled(
    demo: Path, prompts: list[list[int]], usual: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")  # traced, and then run from the trace
    with engine(demo, enforce_eager=False) as llm:
        same(ask(llm, prompts), usual)


def test_pages_say_nearly_what_exact_keys_and_values_say(demo: Path, prompts: list[list[int]], usual: list[Answer]) -> None:
    with engine(demo, spec=None) as llm:
        dense = ask(llm, prompts, logprobs=0, prompt_logprobs=0)
    for got, wanted, prompt in zip(usual, dense, prompts, strict=True):
        n = len(prompt) - 1
        difference = (got.logprobs[:n] - wanted.logprobs[:n]).abs()
        # Queries of the first group see only exact keys and values.
        assert difference[:63].max() < 1e-4
        if n > 64:
            assert 0 < difference.mean() < 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(demo: Path, prompts: list[list[int]], usual: list[Answer], dtype: str) -> None:
    with engine(demo, dtype=dtype) as llm:
        got = ask(llm, prompts[:6], logprobs=0, prompt_logprobs=0)
    for one, wanted, prompt in zip(got, usual, prompts, strict=False):
        n = len(prompt) - 1
        assert (one.logprobs[:n] - wanted.logprobs[:n]).abs().mean() < 0.05


def test_a_pool_holds_what_the_bytes_say(demo: Path) -> None:
    blocks = {}
    for spec in (None, SPEC, "hqmq:3"):
        with engine(demo, spec=spec, dtype="bfloat16") as llm:
            blocks[spec] = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    # 128 tokens: 512 bytes a channel dense; codes, scales and means, and four exact tokens.
    assert blocks[SPEC] / blocks[None] == pytest.approx(128 * 256 / 9728, rel=0.02)
    assert blocks["hqmq:3"] / blocks[None] > 4.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 32}, "no multiple of a page's 64"),
        ({"spec": "hqmq:4 + recent:128"}, "at most 'recent:64'"),
        ({"spec": "hqmq:s96_r4_med3"}, "another number of bytes"),
        ({"kv_cache_dtype": "fp8"}, "leave it out"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused_at_start(demo: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message), engine(demo, **options):
        pass


def test_another_version_is_refused(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.30.2")
    with pytest.raises(ValueError, match=r"serves in vLLM 0\.31 to 0\.33; this is 0\.30\.2"), engine(demo):
        pass


def test_layers_with_windows(tmp_path: Path) -> None:
    """The model has random weights, and two of three layers have sliding windows."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        sliding_window=96,
        max_position_embeddings=1024,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    )
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    tokens = torch.randint(0, 512, (3, 500))
    given = [tokens[i, :n].tolist() for i, n in enumerate((70, 290, 500))]
    options = {"skip_tokenizer_init": True, "detokenize": False}
    with torch.no_grad():
        exact = [model(torch.tensor([prompt])).logits[0].log_softmax(-1) for prompt in given]
    plain = {"skip_tokenizer_init": True}
    with engine(tmp_path, **plain) as llm:
        wanted = ask(llm, given, logprobs=0, prompt_logprobs=0, detokenize=False)
    for one, logits, prompt in zip(wanted, exact, given, strict=True):
        reference = logits[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        difference = (one.logprobs[: len(prompt) - 1] - reference).abs()
        assert difference[:63].max() < 1e-3
        assert difference.mean() < 0.05
    for extra in ({"max_num_batched_tokens": 90}, {"enable_prefix_caching": True}, {"num_gpu_blocks_override": 70}):
        with engine(tmp_path, **plain, **extra) as llm:
            same(ask(llm, given, detokenize=options["detokenize"]), wanted)
            same(ask(llm, given, detokenize=options["detokenize"]), wanted)
