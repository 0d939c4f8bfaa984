"""What a cache must know of a model, read from its config; models that it cannot serve are refused here, by cause."""

from __future__ import annotations

from typing import Any


def read_config(config: Any) -> tuple[Any, list[tuple[tuple[int, int], int | None]]]:
    """What the cache must know of a model.

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
    if getattr(text, "num_kv_shared_layers", None) or "reuse" in (getattr(text, "kv_sharing_modes", None) or ()):
        raise ValueError(f"tessera.Cache does not support {name}: some of its layers read the keys and values of other layers")
    count = getattr(text, "num_hidden_layers", None)
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None)
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        heads = 1  # Falcon counts its one key head nowhere
    dim = getattr(text, "head_dim", None)
    if dim is None and getattr(text, "hidden_size", None) and getattr(text, "num_attention_heads", None):
        dim = text.hidden_size // text.num_attention_heads
    if not isinstance(count, int) or not isinstance(heads, int) or not isinstance(dim, int):
        raise ValueError(f"tessera.Cache does not support {name}: its config does not say how many keys a layer keeps")
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
