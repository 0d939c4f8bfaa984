"""What vLLM asks of an attention backend: how keys and values lie in its pool, and what a step looks like."""

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

from tessera.codecs.key_stats import KeyStats
from tessera.codecs.pages import block_layout
from tessera.integrations.vllm.refusals import spec_refusal
from tessera.integrations.vllm.ring import RingMetadata
from tessera.integrations.vllm.settings import Settings, required
from tessera.kernels.paged import GROUP, BlockLayout, Step

#: Tokens of a block with which the pool holds most: a request's rings fill one, and few blocks waste room for sinks.
PREFERRED = 4 * GROUP


@dataclass
class TesseraMetadata(AttentionMetadata):
    """A step as a layer reads it.

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
        """The step for layers whose rings lie there; made once for all of them."""
        if id(rings) not in self._steps:
            self._steps[id(rings)] = rings, Step(self.first, self.lengths, self.table, rings.rings[: len(self.lengths)], {})
        return self._steps[id(rings)][1]


class TesseraBuilder(AttentionMetadataBuilder[TesseraMetadata]):
    """Takes out of what vLLM says of a step what `TesseraMetadata` holds.

    Raises:
        ValueError: where layers want memory of a kind that is not pages, in one line.
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
        settings: what pages are made of.
    """

    settings: ClassVar[Settings]

    # Pages are written in `forward`: a group must be whole before it is encoded.
    forward_includes_kv_cache_update = True
    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]  # noqa: RUF012
    supported_kv_cache_dtypes = ["auto", "float16", "bfloat16"]  # noqa: RUF012

    @staticmethod
    def get_name() -> str:
        """The name under which vLLM lets others' backends be."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type:
        """See vLLM's `AttentionBackend`."""
        from tessera.integrations.vllm.attention import TesseraAttention

        return TesseraAttention

    @staticmethod
    def get_builder_cls() -> type[TesseraBuilder]:
        """See vLLM's `AttentionBackend`."""
        return TesseraBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Blocks hold whole pages."""
        return [MultipleOf(GROUP)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Where none is set, and the platform asks: blocks of 4 pages hold the rings of all layers in one."""
        return PREFERRED

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Blocks outermost, for pages and rings of different sizes share them; then heads: a page is one run of bytes."""
        return (KVCacheLayout.BLHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Windows are masks over pages."""
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        """Logits that drain a share of the softmax are known to the kernels."""
        return True

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """The packed bytes of a token and key head, from which vLLM counts pages and blocks."""
        # vLLM asks for windows' layers first by a block of one token; it then shares the bytes of a usual block.
        tokens = spec.block_size if spec.block_size % GROUP == 0 else 2 * GROUP
        layout = layout_of(cls.settings, spec.head_size, spec.dtype, tokens, spec.num_kv_heads)
        return replace(spec, dtype=torch.uint8, state_content_bytes=layout.token_bytes)


@cache
def backend(settings: Settings) -> type[TesseraBackend]:
    """The backend with these settings: vLLM asks it about memory where no configuration is at hand."""
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
    """The layout of blocks of as many tokens."""
    pages = tokens // GROUP
    return block_layout(
        settings.codec, head_dim, dtype, pages=pages, sink=settings.sink, heads=kv_heads, layer=layer, stats=stats
    )
