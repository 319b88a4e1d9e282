"""Attention layers of the diffusion UNet.

Every softmax attention of the UNet goes through :func:`attention`, one call to PyTorch's fused
`scaled_dot_product_attention`. Sources: Vaswani et al. (arXiv:1706.03762) for attention, Shazeer (arXiv:2002.05202) for
the gated feed-forward, Rombach et al. (arXiv:2112.10752) for the block layout. State-dict keys are those of the
published latent-diffusion checkpoints.

Dims: B batch, L query tokens, M key tokens, N heads, D channels a head, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.diffusionmodules.util import GroupNorm32, checkpoint, zero_module
from ldm.util import ConfigError

ATTENTION_TYPES = ("softmax", "softmax-xformers")  # both mean attention() here: SDPA is the fused kernel


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, upcast: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for (B, N, L, D) queries and (B, N, M, D) keys and values.

    mask: boolean, True where a key may be seen, broadcastable to (B, N, L, M).
    upcast: compute in float32 whatever the inputs are (SD 2.1 overflows float16 in q k^T); the result has v's dtype.
    """
    if upcast and v.dtype in (torch.float16, torch.bfloat16):
        with torch.autocast(q.device.type, enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask).to(v.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, N*D) -> (B, N, L, D), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, N, L, D) -> (B, L, N*D)."""
    return x.transpose(1, 2).flatten(2)


def Normalize(in_channels: int, num_groups: int = 32) -> GroupNorm32:
    """The GroupNorm in front of a transformer: eps 1e-6, unlike the 1e-5 of the residual blocks."""
    return GroupNorm32(num_groups, in_channels, eps=1e-6)


class GEGLU(nn.Module):
    """x -> (x W + b) * gelu(x V + c), both projections in one matrix."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim_in) -> (..., dim_out)."""
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """Token-wise two-layer network, `mult` times wider inside; gated (GEGLU) when `glu`."""

    def __init__(self, dim: int, dim_out: int | None = None, mult: float = 4, glu: bool = False, dropout: float = 0.0):
        super().__init__()
        inner = int(dim * mult)
        first = GEGLU(dim, inner) if glu else nn.Sequential(nn.Linear(dim, inner), nn.GELU())
        self.net = nn.Sequential(first, nn.Dropout(dropout), nn.Linear(inner, dim if dim_out is None else dim_out))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim_out)."""
        return self.net(x)


class CrossAttention(nn.Module):
    """Multi-head attention of x (B, L, query_dim) on context (B, M, context_dim); on x itself without a context."""

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,  # channels of the context; None: self-attention
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,  # after the output projection
        upcast: bool = False,  # attend in float32
    ):
        super().__init__()
        inner = heads * dim_head
        context_dim = query_dim if context_dim is None else context_dim
        self.heads = heads
        self.upcast = upcast
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return (B, L, query_dim).

        mask: boolean, True where a context token may be seen; (B, M), or of a shape with B first that flattens to it.
        """
        context = x if context is None else context
        if mask is not None:
            mask = mask.bool().flatten(1)[:, None, None, :]  # (B, 1, 1, M)
        q, k, v = (split_heads(y, self.heads) for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out(merge_heads(attention(q, k, v, mask, self.upcast)))


class BasicTransformerBlock(nn.Module):
    """Pre-norm self-attention, cross-attention and feed-forward, each with a residual connection."""

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        gated_ff: bool = True,
        checkpoint: bool = True,  # recompute activations in the backward pass
        disable_self_attn: bool = False,  # the first attention looks at the context too
        upcast: bool = False,  # attend in float32
    ):
        super().__init__()
        heads = {"heads": n_heads, "dim_head": d_head, "dropout": dropout, "upcast": upcast}
        self.disable_self_attn = disable_self_attn
        self.checkpoint = checkpoint
        self.attn1 = CrossAttention(dim, context_dim if disable_self_attn else None, **heads)
        self.ff = FeedForward(dim, dropout=dropout, glu=gated_ff)
        self.attn2 = CrossAttention(dim, context_dim, **heads)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """X (B, L, dim) and context (B, M, context_dim) -> (B, L, dim)."""
        return checkpoint(self._forward, (x, context), self.parameters(), self.checkpoint)

    def _forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x), context if self.disable_self_attn else None)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map (B, C, H, W), with a residual connection around them all."""

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,  # number of transformer blocks
        dropout: float = 0.0,
        context_dim: int | Sequence[int] | None = None,  # one for all blocks, or one for each
        disable_self_attn: bool = False,
        use_linear: bool = False,  # project in and out with nn.Linear (SD 2, SDXL) instead of 1x1 convolutions (SD 1)
        use_checkpoint: bool = True,
        attn_type: str = "softmax",
        upcast: bool = False,
        num_groups: int = 32,
    ):
        super().__init__()
        if attn_type not in ATTENTION_TYPES:
            raise ConfigError(f"attention type {attn_type!r} is unknown: use one of {', '.join(ATTENTION_TYPES)}")
        inner = n_heads * d_head
        dims = _context_dims(context_dim, depth)
        self.in_channels = in_channels
        self.use_linear = use_linear
        self.norm = Normalize(in_channels, num_groups)
        self.proj_in = nn.Linear(in_channels, inner) if use_linear else nn.Conv2d(in_channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner, n_heads, d_head, dropout, dim, True, use_checkpoint, disable_self_attn, upcast) for dim in dims
        )
        self.proj_out = zero_module(nn.Linear(inner, in_channels) if use_linear else nn.Conv2d(inner, in_channels, 1))

    def forward(self, x: Tensor, context: Tensor | Sequence[Tensor | None] | None = None) -> Tensor:
        """context: (B, M, context_dim) for all blocks, or a list with one for each block (or a single one for all)."""
        contexts = list(context) if isinstance(context, list | tuple) else [context]
        if len(contexts) == 1:
            contexts *= len(self.transformer_blocks)
        height, width = x.shape[-2:]
        h = self.norm(x)
        if not self.use_linear:
            h = self.proj_in(h)
        h = h.flatten(2).transpose(1, 2).contiguous()  # (B, C, H, W) -> (B, HW, C)
        if self.use_linear:
            h = self.proj_in(h)
        for block, block_context in zip(self.transformer_blocks, contexts, strict=True):
            h = block(h, block_context)
        if self.use_linear:
            h = self.proj_out(h)
        h = h.transpose(1, 2).unflatten(2, (height, width))  # (B, HW, C) -> (B, C, H, W)
        if not self.use_linear:
            h = self.proj_out(h.contiguous())
        return x + h


def _context_dims(context_dim: int | Sequence[int] | None, depth: int) -> list[int | None]:
    """One context width for each of `depth` blocks."""
    if context_dim is None or isinstance(context_dim, int):
        return [context_dim] * depth
    dims = list(context_dim)
    if len(dims) == depth:
        return dims
    if len(set(dims)) != 1:
        raise ConfigError(f"context_dim={dims} has {len(dims)} entries for {depth} transformer blocks: give one for each")
    return dims[:1] * depth


class LinearAttention(nn.Module):
    """Attention of linear cost over a feature map (arXiv:1812.01243): softmax over the keys' positions only."""

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Conv2d(dim, heads * dim_head * 3, 1, bias=False)
        self.to_out = nn.Conv2d(heads * dim_head, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        height, width = x.shape[-2:]
        q, k, v = self.to_qkv(x).flatten(2).unflatten(1, (3, self.heads, -1)).unbind(1)  # each (B, N, D, HW)
        memory = k.softmax(dim=-1) @ v.transpose(-1, -2)  # (B, N, D, D)
        out = memory.transpose(-1, -2) @ q  # (B, N, D, HW)
        return self.to_out(out.flatten(1, 2).unflatten(2, (height, width)))


class SpatialSelfAttention(nn.Module):
    """Single-head self-attention over the pixels of a feature map, with 1x1 convolutions and a residual connection."""

    def __init__(self, in_channels: int, num_groups: int = 32):
        super().__init__()
        self.in_channels = in_channels
        self.norm = Normalize(in_channels, num_groups)
        self.q = nn.Conv2d(in_channels, in_channels, 1)
        self.k = nn.Conv2d(in_channels, in_channels, 1)
        self.v = nn.Conv2d(in_channels, in_channels, 1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        height, width = x.shape[-2:]
        h = self.norm(x)
        # (B, 1, HW, C); contiguous rows make attention 15 to 25 % faster on the CPU, and are there already in channels_last
        q, k, v = (f(h).flatten(2).transpose(1, 2).unsqueeze(1).contiguous() for f in (self.q, self.k, self.v))
        out = attention(q, k, v).squeeze(1).transpose(1, 2)  # (B, 1, HW, C) -> (B, C, HW)
        return x + self.proj_out(out.unflatten(2, (height, width)))
