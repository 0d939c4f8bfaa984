"""Where a request keeps the group that it is filling: a layer of its own beside each layer of attention.

vLLM gives memory to layers, in blocks of one pool, by what a layer says that it needs. A `Ring` says: one block a request, for
as long as the request runs. So the scheduler counts it, frees it when a request is preempted and gives a new one when the
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
    """One block a request, of `block_size` exact tokens."""

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Width of the table: the worker maps every position to a slot, also where nobody asks for it."""
        return -(-max_len // self.block_size)


@dataclass
class RingMetadata(AttentionMetadata):
    """Which block is whose ring: rings (requests, any) int32, in the first column."""

    rings: Tensor


class RingBuilder(AttentionMetadataBuilder):
    """Takes the rings' table out of what vLLM says of a step."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> RingMetadata:
        """See vLLM's `AttentionMetadataBuilder`."""
        return RingMetadata(common_attn_metadata.block_table_tensor)


class RingBackend(AttentionBackend):
    """What vLLM asks of a ring instead of a backend: it computes nothing."""

    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]  # noqa: RUF012

    @staticmethod
    def get_name() -> str:
        """A name that vLLM knows."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> Any:
        """There is none."""
        raise NotImplementedError

    @staticmethod
    def get_builder_cls() -> type[RingBuilder]:
        """See vLLM's `AttentionBackend`."""
        return RingBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Rings are not cut."""
        return [MultipleOf(GROUP)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Those of pages."""
        return (KVCacheLayout.BLHNC,)


class Ring(torch.nn.Module, AttentionLayerBase):
    """The ring of one layer of attention.

    Args:
        name: that no other layer has; vLLM wants one number in it.
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
        """What the ring needs; bytes throughout, for the pool's other layers hold bytes too."""
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
