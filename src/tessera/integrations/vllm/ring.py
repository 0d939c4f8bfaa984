"""The ring for the incomplete group of a request: a cache layer of its own beside each layer of attention.

vLLM allocates memory to layers, in blocks of one pool, according to each layer's specification. A `Ring` needs one block for
each request as long as it runs. So the scheduler counts it, frees it when a request is preempted and gives a new one when the
request comes back, and never shares it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import CircularBufferSpec, KVCacheLayout

from tessera.kernels.paged import GROUP


@dataclass(frozen=True, kw_only=True)
class RingSpec(CircularBufferSpec):
    """The specification of one block for each request, of `block_size` exact tokens."""

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Return the width of the table: the worker maps every position to a slot, needed or not."""
        return -(-max_len // self.block_size)


@dataclass
class RingMetadata(AttentionMetadata):
    """The metadata of rings: rings (requests, any) int32, whose first column is each request's block."""

    rings: Tensor


class RingBuilder(AttentionMetadataBuilder):
    """Builds the rings' table from vLLM's metadata of a step."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> RingMetadata:
        """See vLLM's `AttentionMetadataBuilder`."""
        return RingMetadata(common_attn_metadata.block_table_tensor)


class RingBackend(AttentionBackend):
    """The backend of a ring, which computes nothing."""

    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]  # noqa: RUF012

    @staticmethod
    def get_name() -> str:
        """Return a name that vLLM knows."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> Any:
        """Refuse: a ring has no attention implementation."""
        raise NotImplementedError

    @staticmethod
    def get_builder_cls() -> type[RingBuilder]:
        """See vLLM's `AttentionBackend`."""
        return RingBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Return multiples of a group: rings are not split."""
        return [MultipleOf(GROUP)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Return the layouts of pages."""
        return (KVCacheLayout.BLHNC,)


class Ring(torch.nn.Module, AttentionLayerBase):
    """The ring of one layer of attention.

    Args:
        name: a unique layer name; vLLM requires exactly one number in it.
        kv_heads: number of key heads of the layer.
        token_bytes: bytes of an exact key and its value.
        tokens: that the ring holds.

    Attributes:
        kv_cache: (blocks, kv_heads, tokens, token_bytes) uint8, once vLLM has bound it.
    """

    def __init__(self, name: str, kv_heads: int, token_bytes: int, tokens: int) -> None:
        super().__init__()
        self.name, self.kv_heads, self.token_bytes, self.tokens = name, kv_heads, token_bytes, tokens
        self.kv_cache = torch.tensor([])

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> RingSpec:
        """Return the memory that the ring needs, as bytes like the pool's other layers."""
        return RingSpec(
            block_size=self.tokens,
            num_kv_heads=self.kv_heads,
            head_size=self.token_bytes // 2,
            dtype=torch.uint8,
            state_content_bytes=self.token_bytes,
            dcp_sharded=False,
        )

    def get_attn_backend(self) -> type[AttentionBackend]:
        """See vLLM's `AttentionLayerBase`."""
        return RingBackend
