"""Infini-attention (arXiv 2404.07143), a baseline: softmax within a segment, a linear memory of all segments before it.

    σ(x) = elu(x) + 1
    read     A_mem = σ(Q) M / (σ(Q) z)
    update   M <- M + σ(K)ᵀ (V - σ(K) M / (σ(K) z)),   z <- z + Σ σ(K)      at the end of a segment
    output   sigmoid(β) A_mem + (1 - sigmoid(β)) A_local                    β: one number per head

Keys and queries of the memory have no rotary phase.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, scaled_dot_product_attention

from tessera.state import MODEL_DTYPES, State


@dataclass(frozen=True, eq=False)
class InfiniState(State):
    """The state of a stream; see `State`.

    Attributes:
        m: (batch, kv_heads, head_dim, head_dim) float32.
        z: (batch, kv_heads, head_dim, 1) float32.
        k, plain_k, v: (batch, kv_heads, n, head_dim), the n tokens of the incomplete segment.
    """

    OWNER: ClassVar[str] = "Infini-attention"
    KIND: ClassVar[str] = "infini_state"
    DTYPES: ClassVar[dict[str, tuple[torch.dtype, ...]]] = {name: MODEL_DTYPES for name in ("k", "plain_k", "v")}

    m: Tensor
    z: Tensor
    k: Tensor
    plain_k: Tensor
    v: Tensor

    def check(self) -> None:
        """See `State.check`."""
        super().check()
        if self.m.ndim != 4 or self.k.ndim != 4 or 0 in self.m.shape[1:]:
            raise ValueError(f"m {tuple(self.m.shape)} and k {tuple(self.k.shape)} are no matrices and keys of heads")
        batch, heads, dim, width = self.m.shape
        pairs = (batch, heads, self.k.shape[2])
        self.check_shapes(z=(batch, heads, dim, 1), k=(*pairs, dim), plain_k=(*pairs, dim), v=(*pairs, width))


class Infini(nn.Module):
    """The attention of one layer.

    Args:
        segment: tokens of a segment.
        heads: query heads.
    """

    def __init__(self, segment: int, heads: int) -> None:
        super().__init__()
        if segment < 1:
            raise ValueError(f"a segment needs at least 1 token, got {segment}")
        self.segment = segment
        self.mix_logit = nn.Parameter(torch.zeros(heads, dtype=torch.float32))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plain_q: Tensor,
        plain_k: Tensor,
        scale: float | None = None,
        state: InfiniState | None = None,
    ) -> tuple[Tensor, InfiniState]:
        """Return outputs (batch, heads, tokens, head_dim) of whole sequences or of the next part, and the new state.

        Args:
            q: (batch, heads, tokens, head_dim); plain_q the same without rotary phase.
            k, v: (batch, kv_heads, tokens, head_dim); plain_k likewise.
            scale: what scores within a segment are multiplied by.
            state: the state that the previous part returned.
        """
        batch, heads, tokens, dim = q.shape
        kv_heads = k.shape[1]
        if state is None:
            m = torch.zeros((batch, kv_heads, dim, v.shape[-1]), dtype=torch.float32, device=q.device)
            state = InfiniState(m, m.new_zeros((batch, kv_heads, dim, 1)), k[:, :, :0], plain_k[:, :, :0], v[:, :, :0])
        m, z, seg_k, seg_plain, seg_v = state.m, state.z, state.k, state.plain_k, state.v
        mix = torch.sigmoid(self.mix_logit.float()).view(1, heads, 1, 1)
        out = []
        at = 0
        while at < tokens:
            size = min(self.segment - seg_k.shape[2], tokens - at)
            past, part = seg_k.shape[2], slice(at, at + size)
            seg_k, seg_plain = torch.cat((seg_k, k[:, :, part]), 2), torch.cat((seg_plain, plain_k[:, :, part]), 2)
            seg_v = torch.cat((seg_v, v[:, :, part]), 2)
            seen = torch.ones(size, past + size, dtype=torch.bool, device=q.device).tril(past)
            local = scaled_dot_product_attention(q[:, :, part], seg_k, seg_v, attn_mask=seen, scale=scale, enable_gqa=True)
            with torch.autocast(q.device.type, enabled=False):
                asked = (elu(plain_q[:, :, part].float()) + 1).unflatten(1, (kv_heads, -1))
                weight = asked @ z.unsqueeze(2)
                # Before the first write the divisor is zero.
                read = (asked @ m.unsqueeze(2) / weight.clamp(min=1e-6)).flatten(1, 2)
                out.append((mix * read + (1 - mix) * local.float()).to(q.dtype))
                if seg_k.shape[2] == self.segment:
                    keys, values = elu(seg_plain.float()) + 1, seg_v.float()
                    known = keys @ m / (keys @ z).clamp(min=1e-6)
                    m = m + keys.transpose(-1, -2) @ (values - known)
                    z = z + keys.sum(2).unsqueeze(-1)
            if seg_k.shape[2] == self.segment:
                seg_k, seg_plain, seg_v = (x[:, :, :0] for x in (seg_k, seg_plain, seg_v))
            at += size
        whole = torch.cat(out, dim=2) if out else q.new_zeros((*q.shape[:3], v.shape[-1]))
        return whole, InfiniState(m, z, seg_k, seg_plain, seg_v)
