"""What a cache needs to know about a model, read from its config; other models are refused with the cause."""

from __future__ import annotations

from typing import Any

from torch import nn


def read_config(config: Any) -> tuple[Any, list[tuple[tuple[int, int], int | None]]]:
    """Read what the cache needs to know about a model.

    Returns:
        the config of its text decoder, and for each layer (kv_heads, head_dim) and the window of its own attention or None.

    Raises:
        ValueError: for a model whose layers do not keep plain keys and values, saying why.
    """
    if not hasattr(config, "get_text_config"):
        raise TypeError(f"expected a transformers model or its config, got {type(config).__name__}")
    text = config.get_text_config(decoder=True)
    name = getattr(text, "model_type", type(text).__name__)
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        raise ValueError(f"tessera.Cache does not support {name}: it is an encoder-decoder, whose decoder needs two caches")
    if getattr(text, "is_heterogeneous", False):
        raise ValueError(f"tessera.Cache does not support {name}: its layers differ in the shape of what they keep")
    if getattr(text, "kv_lora_rank", None):
        raise ValueError(
            f"tessera.Cache does not support {name}: its multi-head latent attention keeps keys and values of different "
            "shapes, made from a latent vector"
        )
    if getattr(text, "cross_attention_layers", None):
        raise ValueError(
            f"tessera.Cache does not support {name}: some of its layers (cross_attention_layers) keep the keys and values of a "
            "picture instead of those of tokens"
        )
    if getattr(text, "num_kv_shared_layers", None) or "reuse" in (getattr(text, "kv_sharing_modes", None) or ()):
        raise ValueError(f"tessera.Cache does not support {name}: some of its layers read the keys and values of other layers")
    count = getattr(text, "num_hidden_layers", None)
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None)
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        heads = 1  # Falcon's config does not count its single key head
    dim = getattr(text, "head_dim", None)
    if dim is None and getattr(text, "hidden_size", None) and getattr(text, "num_attention_heads", None):
        dim = text.hidden_size // text.num_attention_heads
    if not isinstance(count, int) or not isinstance(heads, int) or not isinstance(dim, int):
        raise ValueError(f"tessera.Cache does not support {name}: its config does not say how many keys a layer keeps")
    wide = getattr(text, "v_head_dim", None)
    if isinstance(wide, int) and wide != dim:
        raise ValueError(
            f"tessera.Cache does not support {name}: its values have another width (v_head_dim {wide}) than its keys ({dim})"
        )
    sliding = getattr(text, "sliding_window", None)
    types = getattr(text, "layer_types", None)
    if types is None:
        if getattr(text, "attention_chunk_size", None):
            types = ["chunked_attention"] * count
        else:
            types = ["full_attention" if sliding is None else "sliding_attention"] * count
    other = sorted(set(types) - {"full_attention", "sliding_attention"})
    if other:
        raise ValueError(
            f"tessera.Cache does not support {name}: its layers of type {', '.join(map(repr, other))} keep something else than "
            "keys and values of all tokens or of a sliding window"
        )
    for marker in ("ssm_state_size", "mamba_d_state", "linear_num_value_heads", "state_size"):
        if getattr(text, marker, None):
            raise ValueError(f"tessera.Cache does not support {name}: it has recurrent layers ({marker})")
    return text, [((heads, dim), sliding if kind == "sliding_attention" else None) for kind in types]


def check_shapes(model: nn.Module, layers: list[tuple[tuple[int, int], int | None]]) -> None:
    """Compare what `read_config` found with the projections of the model, for families whose code deviates from their config.

    Args:
        model: a transformers model.
        layers: as `read_config` returns them.

    Raises:
        ValueError: for a model whose layers keep keys and values of other shapes.
    """
    processes = getattr(model, "_tp_size", None) or 1
    for module in model.modules():
        index, kind = getattr(module, "layer_idx", None), type(module).__name__
        if not isinstance(index, int) or index >= len(layers) or not kind.endswith("Attention"):
            continue
        heads, dim = layers[index][0]
        widths = [getattr(getattr(module, name, None), "out_features", None) for name in ("k_proj", "v_proj")]
        # Where heads are sharded over processes, some versions of transformers name the width of this process.
        allowed = [[heads * dim] * 2, [heads // processes * dim] * 2]
        if all(isinstance(width, int) for width in widths) and widths not in allowed:
            raise ValueError(
                f"tessera.Cache does not support {type(model).__name__}: layer {index} makes keys of {widths[0]} and values of "
                f"{widths[1]} numbers a token, where its config says {heads} heads of {dim}"
            )


#: Families whose rotary embedding rotates pairs of neighbouring channels; the others rotate channels i and i + half.
NEIGHBOURS = frozenset(
    ("chatglm", "codegen", "cohere", "cohere2", "ernie4_5", "ernie4_5_moe", "glm", "glm4", "gptj", "helium", "llama4_text")
)


def rotary_partner(text: Any, dim: int) -> tuple[int, ...] | None:
    """Find the other channel of each channel's rotary pair; channels that are not rotated are their own partners.

    Args:
        text: config of the text decoder.
        dim: head_dim.

    Returns:
        head_dim channel numbers; None if the config has no rotary embedding.
    """
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if not rope and getattr(text, "rope_theta", None) is None and getattr(text, "rotary_dim", None) is None:
        return None
    share = (rope or {}).get("partial_rotary_factor") if isinstance(rope, dict) else None
    share = share or getattr(text, "partial_rotary_factor", None) or getattr(text, "rotary_pct", None)
    rotary = getattr(text, "rotary_dim", None) or int(dim * (share or 1.0))
    rotary = min(dim, rotary) // 2 * 2
    if getattr(text, "model_type", "") in NEIGHBOURS:
        first = [i ^ 1 for i in range(rotary)]
    else:
        first = [(i + rotary // 2) % rotary for i in range(rotary)]
    return (*first, *range(rotary, dim))
