"""The attention backend for vLLM: the layout of keys and values in its pool, and the metadata of a step."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from tessera.codecs.channel_stats import KeyStats
from tessera.codecs.pages import block_layout
from tessera.integrations.vllm.refusals import spec_refusal
from tessera.integrations.vllm.ring import RingMetadata
from tessera.integrations.vllm.settings import Settings, required
from tessera.kernels.paged import GROUP, BlockLayout, Step

#: Tokens of a block with which the pool holds most: a request's rings fill one block, and fewer blocks reserve less for sinks.
PREFERRED = 4 * GROUP


@dataclass
class TesseraMetadata(AttentionMetadata):
    """The metadata of a step for a layer.

    Attributes:
        first: (requests + 1,) int32 on the CPU, where each request's tokens begin.
        lengths: (requests,) int32 on the CPU, tokens of each request with those of the step.
        table: (requests, any) int32, its blocks.
        tokens: number of tokens of the step, padding left out.
    """

    first: Tensor
    lengths: Tensor
    table: Tensor
    tokens: int
    _steps: dict[int, tuple[RingMetadata, Step]] = field(default_factory=dict)

    def step(self, rings: RingMetadata) -> Step:
        """Return the step for layers that share a table of rings; made once for all of them."""
        if id(rings) not in self._steps:
            self._steps[id(rings)] = rings, Step(self.first, self.lengths, self.table, rings.rings[: len(self.lengths)], {})
        return self._steps[id(rings)][1]


class TesseraBuilder(AttentionMetadataBuilder[TesseraMetadata]):
    """Builds `TesseraMetadata` from vLLM's metadata of a step.

    Raises:
        ValueError: if layers need memory of a kind other than pages, in one line.
    """

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device) -> None:
        why = spec_refusal(type(kv_cache_spec).__name__)
        if why is not None:
            raise ValueError(f"Tessera cannot serve this model with {required(vllm_config).text!r}: {why}")
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TesseraMetadata:
        """See vLLM's `AttentionMetadataBuilder`."""
        common = common_attn_metadata
        first = common.query_start_loc_cpu.int()
        return TesseraMetadata(
            first=first,
            lengths=common.seq_lens.to("cpu", torch.int32),
            table=common.block_table_tensor,
            tokens=int(first[-1]),
        )


class TesseraBackend(AttentionBackend):
    """Attention over packed pages; `backend` makes it one with settings.

    Attributes:
        settings: the codec and options of pages.
    """

    settings: ClassVar[Settings]

    # Pages are written in `forward`: a group must be complete before it is encoded.
    forward_includes_kv_cache_update = True
    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]  # noqa: RUF012
    supported_kv_cache_dtypes = ["auto", "float16", "bfloat16"]  # noqa: RUF012

    @staticmethod
    def get_name() -> str:
        """Return the name that vLLM reserves for custom backends."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type:
        """See vLLM's `AttentionBackend`."""
        from tessera.integrations.vllm.packed_attention import TesseraAttention

        return TesseraAttention

    @staticmethod
    def get_builder_cls() -> type[TesseraBuilder]:
        """See vLLM's `AttentionBackend`."""
        return TesseraBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Return the block sizes that hold whole pages."""
        return [MultipleOf(GROUP)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Return the default block size: with 4 pages one block holds the rings of all layers."""
        return PREFERRED

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Return the layout: blocks outermost, which pages and rings share, then heads, so that a page is contiguous."""
        return (KVCacheLayout.BLHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Return True: windows are masks over pages."""
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        """Return True: the kernels support attention-sink logits."""
        return True

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Give vLLM the packed bytes of a token and key head, from which it counts pages and blocks."""
        # vLLM first asks for layers with windows with a block of one token; that shares the bytes of a usual block.
        tokens = spec.block_size if spec.block_size % GROUP == 0 else 2 * GROUP
        layout = layout_of(cls.settings, spec.head_size, spec.dtype, tokens, spec.num_kv_heads)
        return replace(spec, dtype=torch.uint8, state_content_bytes=layout.token_bytes)


@cache
def backend(settings: Settings) -> type[TesseraBackend]:
    """Make the backend with these settings, because vLLM asks it about memory where no configuration is available."""
    return type("TesseraBackend", (TesseraBackend,), {"settings": settings})


def layout_of(
    settings: Settings,
    head_dim: int,
    dtype: torch.dtype,
    tokens: int,
    kv_heads: int,
    layer: int = 0,
    stats: KeyStats | None = None,
) -> BlockLayout:
    """Return the layout of blocks of so many tokens."""
    pages = tokens // GROUP
    return block_layout(
        settings.codec, head_dim, dtype, pages=pages, sink=settings.sink, heads=kv_heads, layer=layer, stats=stats
    )
