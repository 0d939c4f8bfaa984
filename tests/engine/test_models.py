"""For small random models of several families, an engine with packed pages computes the same as transformers with the
definition of paged attention, and the same tokens whether or not requests are split, shared or preempted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from engine_fixtures import SPEC, Answer, ask, counter, engine, random_stats

from tessera.codecs.channel_stats import KeyStats, save_stats
from tessera.codecs.pages import block_layout, write
from tessera.integrations.vllm.settings import read
from tessera.kernels import paged
from tessera.kernels.paged import GROUP

pytestmark = pytest.mark.vllm

#: Config fields of every model here; the others are defaults of its family.
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "max_position_embeddings": 1024,
}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}

#: Class and arguments of a config, by the particular feature of the family.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "normed keys and heads of 128": ("Qwen3", {**HEADS, "head_dim": 128}),
    "biases and heads of 32": ("Qwen2", HEADS),
    "four queries to a key head of 64": ("Llama", {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64}),
    "one window for all layers": ("Mistral", {**HEADS, "head_dim": 64, "sliding_window": 150}),
    "scores of another scale": ("Granite", {**HEADS, "attention_multiplier": 0.25, "logits_scaling": 2.0}),
    "capped scores and a window for every other layer": (
        "Gemma2",
        {**HEADS, "head_dim": 64, "sliding_window": 150, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 64},
    ),
    "part of a key is rotated and heads are as many as keys": (
        "Phi",
        {"num_attention_heads": 2, "num_key_value_heads": 2, "partial_rotary_factor": 0.5},
    ),
    "heads of 80": ("Phi3", {**HEADS, "hidden_size": 320, "pad_token_id": 0, "original_max_position_embeddings": 1024}),
}


def definition(
    spec: str = SPEC, stats: Sequence[KeyStats] | None = None, pages: int = 2
) -> Callable[..., tuple[torch.Tensor, None]]:
    """Return the definition of attention over pages as an attention function of transformers."""
    settings = read(spec)

    def attention(
        module: torch.nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        sliding_window: int | None = None,
        s_aux: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        tokens, kv_heads, dim = k.shape
        mine = None if stats is None else stats[module.layer_idx]
        shape = {"pages": pages, "sink": settings.sink, "heads": kv_heads, "layer": module.layer_idx}
        layout = block_layout(settings.codec, dim, k.dtype, stats=mine, **shape)
        blocks = -(-tokens // layout.tokens)
        pool = torch.zeros(blocks, kv_heads, layout.nbytes, dtype=torch.uint8)
        ring = torch.zeros(1, kv_heads, GROUP, layout.ring_bytes, dtype=torch.uint8)
        first, lengths = torch.tensor([0, tokens]).int(), torch.tensor([tokens]).int()
        step = paged.Step(first, lengths, torch.arange(blocks).int()[None], torch.zeros(1, 1).int(), {})
        group = step.whole_groups()[1].long()
        if len(group):
            whole = paged.collect(k, v, ring, layout, step)
            write(settings.codec, layout, pool, group // pages, group % pages, *whole, group == 0)
        scale = dim**-0.5 if scaling is None else scaling
        call = paged.PagedCall(q, k, v, pool, ring, layout, step, scale, softcap, sliding_window, s_aux)
        return paged.attend_paged(call)[None], None

    return attention


def scores(model: torch.nn.Module, prompts: list[list[int]], attention: Callable[..., Any]) -> list[torch.Tensor]:
    """Return the log-probabilities of each prompt's tokens from the second on."""
    transformers.AttentionInterface.register("definition", attention)
    model.set_attn_implementation("definition")
    found = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            found.append(model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0])
    return found


def check(got: Sequence[Answer], wanted: Sequence[torch.Tensor]) -> None:
    """The first group must be exact. After it the kernels write queries in two limbs of eight bits, which random statistics,
    wider than those of models, make coarser; and a key between two codewords may be rounded to either.
    """
    for one, reference in zip(got, wanted, strict=True):
        difference = (one.logprobs[: len(reference)] - reference).abs()
        assert difference[:63].max() < 1e-5
        assert difference.median() < 2e-3
        assert difference.mean() < 5e-3


def made(name: str, folder: Path, **options: Any) -> Any:
    """Save a model of a family, with random weights large enough for attention to be peaked."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **options})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_family_cut_shared_and_preempted(family: str, tmp_path: Path) -> None:
    name, options = FAMILIES[family]
    model = made(name, tmp_path, **options)
    tokens = torch.randint(1, 512, (4, 300))
    tokens[3, :200] = tokens[2, :200]  # two requests with the same beginning
    prompts = [tokens[i, :n].tolist() for i, n in enumerate((70, 125, 260, 280))]
    # Before the engine starts: for families without code in vLLM it uses that of transformers, which it modifies in this
    # process.
    reference = scores(model, prompts, definition())
    with engine(tmp_path, skip_tokenizer_init=True, max_num_seqs=1) as llm:
        wanted = ask(llm, prompts, tokens=280, logprobs=0, prompt_logprobs=0, detokenize=False)
    check(wanted, reference)

    # The pool has space for the beginnings of three requests, and for at most two whole ones.
    hard = {"max_num_batched_tokens": 100, "enable_prefix_caching": True, "num_gpu_blocks_override": 16, "max_model_len": 640}
    with engine(tmp_path, skip_tokenizer_init=True, **hard) as llm:
        got = ask(llm, prompts, tokens=280, detokenize=False)
        again = ask(llm, prompts, tokens=280, detokenize=False)
        assert counter(llm, "num_preemptions") > 0
        assert sum(answer.shared for answer in again) > 0
    for run in (got, again):
        assert [answer.tokens for answer in run] == [answer.tokens for answer in wanted]


#: Class and arguments of a config, the model's class if not the family's usual one, and the reason of the refusal.
REFUSED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "ALiBi": ("Bloom", {"n_layer": 2, "n_head": 4}, "ForCausalLM", "ALiBi's slopes"),
    "latent attention": (
        "DeepseekV2",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": None,
            "kv_lora_rank": 64,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 3,
        },
        "ForCausalLM",
        "MLA",
    ),
    "an encoder": ("Bert", {"num_attention_heads": 4}, "Model", "encoder only"),
    "layers without keys of their own": (
        "Gemma3nText",
        {
            **HEADS,
            "num_hidden_layers": 4,
            "head_dim": 64,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 512,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 4,
        },
        "ForCausalLM",
        "another's keys",
    ),
    "chunks instead of windows": (
        "Llama4Text",
        {**HEADS, "head_dim": 64, "attention_chunk_size": 128, "intermediate_size_mlp": 256, "num_local_experts": 2},
        "ForCausalLM",
        "chunked local attention",
    ),
    "layers with a state": (
        "GraniteMoeHybrid",
        {
            **HEADS,
            "layer_types": ["mamba", "attention", "mamba"],
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
            "mamba_d_state": 32,
            "num_local_experts": 0,
            "shared_intermediate_size": 256,
        },
        "ForCausalLM",
        "Mamba",
    ),
}


@pytest.mark.parametrize("family", REFUSED, ids=str)
def test_a_family_that_is_refused_at_start(family: str, tmp_path: Path) -> None:
    name, options, kind, message = REFUSED[family]
    architecture = name.removesuffix("Text") + kind
    getattr(transformers, f"{name}Config")(**{**SIZES, **options}, architectures=[architecture]).save_pretrained(tmp_path)
    starting = engine(tmp_path, skip_tokenizer_init=True, load_format="dummy", max_model_len=512)
    with pytest.raises(ValueError, match=message) as raised, starting:
        pass
    assert "\n" not in str(raised.value)


def test_logits_that_drain_the_softmax(tmp_path: Path) -> None:
    """gpt-oss has windows, experts, and an attention sink logit per head."""
    model = made("GptOss", tmp_path, **HEADS, head_dim=64, num_local_experts=2, num_experts_per_tok=1, sliding_window=100)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_(1.0, 1.0)
    model.save_pretrained(tmp_path)
    prompt = torch.randint(1, 512, (200,)).tolist()
    reference = scores(model, [prompt], definition())
    with engine(tmp_path, skip_tokenizer_init=True) as llm:
        check(ask(llm, [prompt], tokens=1, prompt_logprobs=0, detokenize=False), reference)


@pytest.mark.parametrize(
    ("spec", "counted", "pages", "dim"),
    [
        ("sink:4 + hqmq:4", True, 2, 64),
        ("sink:1 + hqmq:3", True, 4, 128),
        ("hqmq:k4.5v3.5", False, 1, 64),
        ("sink:4 + hqmq:s96_r4", False, 3, 64),
        ("sink:4 + q4_0", False, 2, 64),
        ("(k=kivi:4,v=hqmq:3)", False, 4, 64),
    ],
)
def test_codecs_statistics_and_sizes_of_blocks(spec: str, counted: bool, pages: int, dim: int, tmp_path: Path) -> None:
    model = made("Llama", tmp_path, **HEADS, head_dim=dim)
    stats = None
    settings: dict[str, Any] = {"tessera": spec}
    if counted:
        # Channels of very different widths reveal a layer or head that uses another's statistics.
        stats = random_stats(SIZES["num_hidden_layers"], 2, dim)
        (tmp_path / "known").mkdir()  # vLLM loads every file beside a model's weights as weights
        settings["tessera_stats"] = str(tmp_path / "known" / "stats.safetensors")
        save_stats(stats, settings["tessera_stats"])
    prompts = [torch.randint(1, 512, (n,)).tolist() for n in (90, 420)]
    reference = scores(model, prompts, definition(spec, stats, pages))
    options = {"additional_config": settings, "block_size": GROUP * pages, "max_num_batched_tokens": 200}
    with engine(tmp_path, skip_tokenizer_init=True, **options) as llm:
        got = ask(llm, prompts, tokens=1, prompt_logprobs=0, detokenize=False)
    check(got, reference)
