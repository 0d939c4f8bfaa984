"""Give a model key channels of very different widths without changing its output.

Both channels of each rotary pair of a key head are multiplied by exp(spread · n), n standard normal, and the queries of its
group divided by the same. Scores, and so the model's output, stay the same up to rounding. Models such as Qwen2.5 and Qwen3
have such widths. A cache that does not see the queries cannot tell an important channel from a wide one.

    python benchmarks/rescaled_keys.py --model ./SmolLM2-135M-Instruct --out ./rescaled
    tessera compare --model ./SmolLM2-135M-Instruct --model ./rescaled --protocol paper --context 512
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tessera.cache.model_config import read_config, rotary_partner

#: Standard deviation of the logarithm of the factors: one in three channels is 3.3 times wider or narrower than the median.
SPREAD = 1.2


@torch.no_grad()
def rescale(model: Any, spread: float = SPREAD, seed: int = 0) -> None:
    """Rescale the keys and queries of a model in place.

    Args:
        model: a transformers model with a `q_proj` and a `k_proj` in each layer's `self_attn`, followed by nothing but a
            rotary embedding.
        spread: standard deviation of the logarithms of the factors.
        seed: of the factors.

    Raises:
        ValueError: for a model that normalises queries or keys, which would undo it.
    """
    text, layers = read_config(model.config)
    generator = torch.Generator().manual_seed(seed)
    for layer, ((heads, dim), _) in zip(model.model.layers, layers, strict=True):
        attention = layer.self_attn
        if any(hasattr(attention, name) for name in ("q_norm", "k_norm")):
            raise ValueError(f"{type(model).__name__} normalises its queries and keys, so their channels cannot be rescaled")
        factor = (spread * torch.randn(heads, dim, generator=generator)).exp()
        for channel, other in enumerate(rotary_partner(text, dim) or ()):
            if other > channel:
                factor[:, other] = factor[:, channel]
        group = attention.q_proj.out_features // (heads * dim)
        _multiply(attention.k_proj, factor.flatten())
        _multiply(attention.q_proj, 1 / factor.repeat_interleave(group, 0).flatten())


def _multiply(linear: Any, factor: Tensor) -> None:
    for parameter in (linear.weight, linear.bias):
        if parameter is not None:
            wide = parameter.float() * (factor if parameter.ndim == 1 else factor[:, None])
            parameter.copy_(wide.to(parameter.dtype))


def main() -> None:
    """Read a model, rescale it, check that its output is unchanged, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--out", required=True, help="folder of the rescaled model, in float32")
    parser.add_argument("--spread", type=float, default=SPREAD)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # Everything in float32: rounded factors would change what the model computes.
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    ids = torch.arange(64)[None] % model.config.vocab_size
    with torch.no_grad():
        before = model(ids).logits.log_softmax(-1)
        rescale(model, options.spread, options.seed)
        after = model(ids).logits.log_softmax(-1)
    moved = float((before.exp() * (before - after)).sum(-1).mean())
    if not math.isfinite(moved) or moved > 1e-6:
        raise SystemExit(f"the rescaled model says something else (KL {moved:.2g}); it is not written")
    model.save_pretrained(options.out)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)
    print(f"{options.out}: keys rescaled, KL to the model before {moved:.1e}")


if __name__ == "__main__":
    main()
