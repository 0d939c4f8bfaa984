"""A layer of attention: it encodes the groups that a step completes, and reads packed pages in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from tessera.codecs.channel_stats import KeyStats
from tessera.codecs.pages import write
from tessera.integrations.vllm import statistics
from tessera.integrations.vllm.backend import TesseraMetadata, layout_of
from tessera.integrations.vllm.refusals import engine_refusal, layer_refusal
from tessera.integrations.vllm.ring import Ring
from tessera.integrations.vllm.settings import STATS_VARIABLE, required
from tessera.kernels import dispatch
from tessera.kernels.paged import GROUP, BlockLayout, PagedCall

_log = init_logger("vllm.tessera")


class TesseraAttention(AttentionImpl[TesseraMetadata]):
    """vLLM's `AttentionImpl` over packed pages; its arguments are those of every attention layer of vLLM.

    Raises:
        ValueError: where the model or the engine cannot be served, in one line.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **extra: Any,
    ) -> None:
        config = get_current_vllm_config()
        self.settings = required(config)
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.window, self.softcap, self.drains = sliding_window, logits_soft_cap or None, sinks
        self.kv_cache_dtype = kv_cache_dtype
        self.dtype = torch.get_default_dtype()
        why = engine_refusal(config) or layer_refusal(
            heads=num_heads,
            kv_heads=self.num_kv_heads,
            attn_type=attn_type,
            alibi=alibi_slopes,
            shared_with=kv_sharing_target_layer_name,
            dtype=self.dtype,
            extra=extra,
        )
        if why is not None:
            raise ValueError(f"Tessera cannot serve this model with {self.settings.text!r}: {why}")
        self.layout: BlockLayout | None = None
        known = config.compilation_config.static_forward_context
        self.number = sum(isinstance(layer, Ring) for layer in known.values())
        self.stats = self._statistics(config)
        layout = layout_of(self.settings, head_size, self.dtype, config.cache_config.block_size, self.num_kv_heads)
        drafts = config.speculative_config is not None
        # vLLM reads one number out of a layer's name, and sorts by it: this one comes after all layers of the model.
        name = f"tessera.ring.{10_000 + self.number}"
        self.ring = Ring(name, self.num_kv_heads, layout.ring_bytes, 2 * GROUP if drafts else GROUP)
        known[name] = self.ring

    def _statistics(self, config: Any) -> KeyStats | None:
        """Load the statistics of this layer's keys; None: keys are coded as they come."""
        path = self.settings.stats
        if path is None:
            if self.number == 0 and self.settings.codec.weighs:
                _log.info("Tessera codes keys as they come: %s names no statistics of them", STATS_VARIABLE)
            return None
        if self.number == 0:
            _log.info("Tessera codes keys as queries see them, by %s", path)
        layers = config.model_config.get_total_num_hidden_layers()
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        return statistics.of_layer(path, self.number, layers, self.num_kv_heads, self.head_size, rank, ranks)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: TesseraMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of a step's tokens, all requests at once.

        Args:
            layer: vLLM's layer around this.
            query: (tokens, heads, head_size).
            key, value: (tokens, kv_heads, head_size), of the same tokens.
            kv_cache: (blocks, kv_heads, tokens of a block, bytes of a token) uint8.
            attn_metadata: metadata of the step; None while vLLM measures memory.
            output: (tokens, heads, head_size), takes the result.
            output_scale, output_block_scale: not supported.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("Tessera's attention gives its results unquantised")
        if attn_metadata is None or kv_cache.ndim < 4:
            return output.zero_()
        n = attn_metadata.tokens
        step = attn_metadata.step(get_forward_context().attn_metadata[self.ring.name])
        pool, ring = kv_cache.flatten(2), self.ring.kv_cache
        if self.layout is None:
            tokens = kv_cache.shape[2]
            stats = None if self.stats is None else self.stats.to(kv_cache.device)
            self.layout = layout_of(self.settings, self.head_size, self.dtype, tokens, self.num_kv_heads, self.number, stats)
        q, k, v = query[:n], key[:n], value[:n]
        groups = step.whole_groups()
        if groups.shape[1]:
            keys, values = dispatch.collect(k, v, pool, ring, self.layout, step)
            request, group = groups.to(pool.device).long()
            block = step.table.to(pool.device)[request, group // self.layout.pages].long()
            write(self.settings.codec, self.layout, pool, block, group % self.layout.pages, keys, values, group == 0)
        call = PagedCall(q, k, v, pool, ring, self.layout, step, self.scale, self.softcap, self.window, self.drains)
        dispatch.attend_paged(call, out=output[:n])
        return output
