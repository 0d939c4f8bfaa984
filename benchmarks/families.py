"""Try every causal family of transformers, built small, with a `tessera.Cache`, a Tensor Cache and a Tensor Memory.

A family is served if its logits over prefill, a chunk and single steps, in a batch with left padding, are those of
transformers' own `DynamicCache`, or within a bound of them where the cache quantises; it is refused if the cache raises an
error with the reason. Memories are checked for consistency: a text read in one call and in parts must give the same
logits. A family that is neither served nor refused is a fault, and makes the exit status 1.

Example:

    python benchmarks/families.py                      # writes docs/results/families.json
    python benchmarks/families.py --only llama gemma3  # prints these, writes nothing
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import tessera
from tessera.files import write_json
from tessera.tensor_cache import TensorCacheConfig
from tessera.tensor_memory import TensorMemoryConfig

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "results" / "families.json"

VOCAB, TOKENS, PADS = 97, 120, (0, 7)
#: Lengths of calls: a prefill, a chunk, and single steps.
CUTS = (100, 12, 1, 1, 1, 1, 1, 1, 1, 1)
PACKED = "sink:4 + hqmq:4 + recent:16"
#: Maximum relative root mean square error of the logits: exact cache, quantised cache, text read in parts.
EXACT, BOUND, STREAMED = 1e-4, 0.6, 1e-3
WINDOW, SINK = 32, 4

#: Sizes of the small models, by config field.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_inner", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "intermediate_size_mlp", "dense_intermediate_size", "dff"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "kv_channels", "v_head_dim", "qk_nope_head_dim", "kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("rotary_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("initializer_range", "init_std"), 0.1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 512),
    "vocab_size": VOCAB,
    "is_decoder": True,
    "depth": 2,
    "layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: The fields among these that are also set for vision and audio encoders.
TOWER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layers", "depth")
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
#: Rotary channels for time, height and width, together half of head_dim.
_SECTIONS = {"rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}}
#: Further settings that some families need.
EXTRA: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [32, 32]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "paddleocr_vl_text", "glm4v_text", "glm_ocr_text"), _SECTIONS),
    "glm4v_moe_text": {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
#: Maximum number of parameters.
MOST = 100_000_000
#: Settings of a layer pattern that must match the number of layers.
PATTERNS = ("layer_types", "mlp_layer_types", "layers_block_type", "attention_types", "indexer_types")


def families() -> list[str]:
    """Return the model types of all causal language models and image-text models; the decoders of the latter are tried."""
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    pictures = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return sorted({*causal, *pictures})


def small_config(kind: str) -> Any:
    """Return a small config of a family, with layers of every type that its default has."""
    default = CONFIG_MAPPING[kind]()
    text = default.get_text_config(decoder=True)
    own = _small(text)
    if text is default:
        return type(default)(**own)
    parts = {name: getattr(default, name, None) for name in default.sub_configs}
    given: dict[str, Any] = {}
    for name, part in parts.items():
        if part is text:
            given[name] = {**own, "model_type": text.model_type}
        elif hasattr(part, "to_dict"):
            given[name] = {**{k: v for k, v in _small(part).items() if k in TOWER}, "model_type": part.model_type}
    return type(default)(**given)


def _small(text: Any) -> dict[str, Any]:
    fields = text.to_dict()
    sizes = {name: value for name, value in SIZES.items() if fields.get(name) is not None}
    for name in ("num_key_value_heads", "num_kv_heads"):
        if fields.get(name) is not None:
            sizes[name] = 4 if fields[name] == text.num_attention_heads else 2
    if "head_dim" in fields:
        sizes["head_dim"] = SIZES["head_dim"]
    if isinstance(fields.get("sliding_window"), int):
        sizes["sliding_window"] = 24
    patterns = {name: fields[name] for name in PATTERNS if isinstance(fields.get(name), list) and fields[name]}
    layers = max([2, *(len(dict.fromkeys(map(str, pattern))) for pattern in patterns.values())])
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if name in sizes:
            sizes[name] = layers
    for name, pattern in patterns.items():
        kinds = [next(x for x in pattern if str(x) == word) for word in dict.fromkeys(map(str, pattern))]
        sizes[name] = [kinds[i % len(kinds)] for i in range(layers)]
    return sizes | EXTRA.get(text.model_type, {})


def small_model(kind: str, config: Any) -> Any:
    """Make a model with seeded random weights that are large enough for attention to matter."""
    names = {**modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    make = getattr(transformers, names[kind])
    with torch.device("meta"):
        size = sum(p.numel() for p in make(config).parameters())
    if size > MOST:
        raise ValueError(f"its smallest form here has {size:,} parameters")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = make(config).eval().float()
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p.normal_(0, 0.1)
    return model


def text() -> tuple[Tensor, Tensor]:
    """Return token ids and a mask with left padding, both (rows, tokens)."""
    random = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCAB, (len(PADS), TOKENS), generator=random)
    return ids, (torch.arange(TOKENS) >= torch.tensor(PADS)[:, None]).long()


@torch.no_grad()
def logits(model: Any, cache: Any, cuts: tuple[int, ...] = CUTS) -> Tensor:
    """Return the logits of all real tokens, (n, vocabulary), for a text read in these parts, without a cache if it is None."""
    ids, mask = text()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    takes = inspect.signature(model.forward).parameters
    out, start = [], 0
    for size in cuts:
        stop = start + size
        given: dict[str, Any] = {"attention_mask": mask[:, :stop]}
        if "position_ids" in takes:
            given["position_ids"] = positions[:, start:stop]
        out.append(model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=cache is not None, **given).logits)
        start = stop
    return torch.cat(out, 1).float()[mask.bool()]


def error(found: Tensor, wanted: Tensor) -> float:
    """Return the root mean square error relative to the root mean square of the expected values."""
    return float(((found - wanted).square().mean() / wanted.square().mean()).sqrt())


def walk(kind: str) -> dict[str, Any]:
    """Try one family.

    Returns:
        its name and, for "cache", "tensor_cache" and "tensor_memory", an outcome: "served", "decoded" (only a cache made
        from the config works, which decodes for the model's own attention), "refused", "not tried" or "fault"; with the reason.
    """
    row: dict[str, Any] = {"family": kind}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = small_config(kind)
        except Exception as problem:
            refused = _refusal(lambda: CONFIG_MAPPING[kind]())
            return row | {"cache": refused or _outcome("not tried", f"no small config: {_line(problem)}")}
        refused = _refusal(lambda: config)
        if refused:
            row["cache"] = refused
        try:
            model = small_model(kind, config)
        except Exception as problem:
            row.setdefault("cache", _outcome("not tried", f"no small model: {_line(problem)}"))
            return row
        try:
            wanted = logits(model, DynamicCache(config=model.config))
            whole = logits(model, None, (TOKENS,))
            if not wanted.isfinite().all():
                raise ValueError("logits that are not finite")
        except Exception as problem:
            why = _outcome("not tried", f"does not run with DynamicCache: {_line(problem)}")
            row.setdefault("cache", _refusal(lambda: model) or why)
            return row
        row["own"] = error(wanted, whole)
        if "cache" not in row:
            row["cache"] = _tried(lambda: _cache(model, wanted))
        if row["own"] < EXACT:
            row["tensor_cache"] = _tried(lambda: _tensor_cache(model))
            row["tensor_memory"] = _tried(lambda: _tensor_memory(model))
    return row


def _refusal(make: Callable[[], Any]) -> dict[str, Any] | None:
    """Return the outcome for a refused cache of a config or a model."""
    try:
        given = make()
    except Exception:
        return None
    try:
        tessera.Cache(PACKED, given)
    except ValueError as reason:
        return _outcome("refused", _line(reason).partition(". tessera.Cache(spec")[0])
    return None


def _cache(model: Any, wanted: Tensor) -> dict[str, Any]:
    outcome, given, reason = "served", model, ""
    try:
        tessera.Cache("dense", model)
    except ValueError as why:
        if "tessera.Cache(spec, model.config) works" not in str(why):
            return _outcome("refused", _line(why))
        outcome, given, reason = "decoded", model.config, _line(why).partition(". tessera.Cache(spec")[0]
    same = error(logits(model, tessera.Cache("dense", given)), wanted)
    near = error(logits(model, tessera.Cache(PACKED, given)), wanted)
    if outcome == "served":
        tessera.disable(model)
    if not (same < EXACT and near < BOUND):
        return _outcome("fault", f"wrong numbers: {same:.2g} and {near:.2g}")
    return _outcome(outcome, reason) | {"dense": same, "quantised": near}


def _tensor_cache(model: Any) -> dict[str, Any]:
    spec = f"sink:{SINK} + window:{WINDOW} + tc"
    reason = ""
    try:
        try:
            tessera.attach(model, TensorCacheConfig(window=WINDOW, sink=SINK))
        except ValueError as why:
            if "rotary=True" not in str(why):
                raise
            tessera.attach(model, TensorCacheConfig(window=WINDOW, sink=SINK, rotary=True))
            reason = "with rotary=True"
    except ValueError as why:
        return _outcome("refused", _line(why))
    try:
        _open(model)
        whole = logits(model, None, (TOKENS,))
        found = error(logits(model, tessera.Cache(spec, model)), whole)
    finally:
        tessera.detach(model)
    if not found < STREAMED:
        return _outcome("fault", f"reading in parts differs: {found:.2g}")
    return _outcome("served", reason) | {"streamed": found}


def _tensor_memory(model: Any) -> dict[str, Any]:
    try:
        tessera.attach(model, TensorMemoryConfig(channels=4, grid=(3, 3, 3), gate_init=1.0))
    except ValueError as why:
        return _outcome("refused", _line(why))
    try:
        _open(model)
        whole = logits(model, None, (TOKENS,))
        found = error(logits(model, DynamicCache(config=model.config)), whole)
    finally:
        tessera.detach(model)
    if not found < STREAMED:
        return _outcome("fault", f"reading in parts differs: {found:.2g}")
    return _outcome("served", "") | {"streamed": found}


def _open(model: Any) -> None:
    """Set the weights of attached memories so that their output is not zero."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for group in tessera.adapters.memory_parameters(model):
            for p in group["params"]:
                if p.dim() > 1:
                    p.normal_(0, 0.1)


def _tried(attempt: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return attempt()
    except Exception as problem:
        return _outcome("fault", f"{type(problem).__name__} at a call: {_line(problem)}")


def _outcome(outcome: str, reason: str) -> dict[str, Any]:
    return {"outcome": outcome, "reason": reason}


def _line(problem: BaseException) -> str:
    return " ".join(str(problem).split())[:300] or type(problem).__name__


def main() -> int:
    """Try all families and write the outcomes; return 1 if a family is neither served nor refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="model types to try and print, writing nothing")
    only = parser.parse_args().only
    transformers.logging.set_verbosity_error()
    rows = []
    for kind in only or families():
        rows.append(walk(kind))
        print(json.dumps(rows[-1]), flush=True)
    if not only:
        write_json(OUT, {"transformers": transformers.__version__, "rows": rows})
    return int(any(part.get("outcome") == "fault" for row in rows for part in row.values() if isinstance(part, dict)))


if __name__ == "__main__":
    sys.exit(main())
