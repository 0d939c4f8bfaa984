"""Checks for unsupported models and settings before the first token. The CPU platform of vLLM validates nothing itself."""

from __future__ import annotations

from typing import Any

import torch

from tessera.kernels.paged import GROUP

#: Tokens that a ring holds beyond a group for drafted tokens, and so the most that may be drafted at once.
DRAFTS = GROUP


def engine_refusal(config: Any) -> str | None:
    """Say why an engine cannot serve with Tessera, or return None if it can.

    Args:
        config: its `VllmConfig`.
    """
    cache, parallel = config.cache_config, config.parallel_config
    if cache.block_size % GROUP:
        return f"blocks of {cache.block_size} tokens are no multiple of a page's {GROUP}; set --block-size {2 * GROUP}"
    unit = getattr(cache, "prefix_match_unit", None)
    if unit is not None and unit % GROUP:
        return f"prefixes can be shared in multiples of {GROUP} tokens, not of {unit}; leave --prefix-match-unit out"
    if cache.cache_dtype not in ("auto", "bfloat16", "float16"):
        return f"--kv-cache-dtype {cache.cache_dtype} asks for another form of the same cache; leave it out"
    if parallel.pipeline_parallel_size > 1:
        return "layers on several devices one after the other (pipeline parallel) are not supported"
    if getattr(parallel, "decode_context_parallel_size", 1) > 1 or getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        return "contexts that are cut over devices (context parallel) are not supported"
    if config.kv_transfer_config is not None:
        return "moving keys and values between engines (--kv-transfer-config) is not supported"
    if config.model_config.is_hybrid:
        return "some of its layers keep a state of a fixed size (Mamba and its like) in blocks of their own size"
    speculative = config.speculative_config
    if speculative is not None:
        if speculative.method not in ("ngram", "suffix"):
            return f"drafting with a second model or extra layers ({speculative.method}) is not supported; 'ngram' is"
        if speculative.num_speculative_tokens > DRAFTS:
            return f"at most {DRAFTS} tokens can be drafted at once, not {speculative.num_speculative_tokens}"
    return None


def spec_refusal(kind: str) -> str | None:
    """Say why the memory that vLLM requests for a layer is not supported, or return None if it is.

    Args:
        kind: name of the class of its `KVCacheSpec`.
    """
    if kind in ("FullAttentionSpec", "SlidingWindowSpec"):
        return None
    if kind == "ChunkedLocalAttentionSpec":
        return "some of its layers forget all at the end of a chunk (chunked local attention); windows that slide are supported"
    return f"some of its layers want memory of another kind ({kind})"


def layer_refusal(
    *,
    heads: int,
    kv_heads: int,
    attn_type: str,
    alibi: Any,
    shared_with: str | None,
    dtype: torch.dtype,
    extra: dict[str, Any],
) -> str | None:
    """Say why a layer of attention cannot be served, or return None if it can.

    Args:
        heads, kv_heads: number of query heads and of key heads.
        attn_type: "decoder" or another of vLLM's `AttentionType`.
        alibi: its slopes, or None.
        shared_with: the layer whose keys and values it reads instead of its own, or None.
        dtype: dtype of the model.
        extra: arguments beyond those of every layer.
    """
    if attn_type != "decoder":
        return f"its attention is that of an {attn_type.replace('_', ' ')}; only decoders keep keys and values"
    if alibi is not None:
        return "its attention adds ALiBi's slopes to scores, which the kernels do not"
    if shared_with is not None:
        return f"some of its layers read another's keys and values ({shared_with})"
    if heads % kv_heads:
        return f"{heads} heads of queries do not share {kv_heads} heads of keys evenly"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it runs in {dtype}; float32, bfloat16 and float16 are supported"
    unknown = sorted(name for name, value in extra.items() if name != "sinks" and value not in (None, False, -1))
    if unknown:
        return f"its attention has {', '.join(unknown)}, which the kernels do not know"
    return None
