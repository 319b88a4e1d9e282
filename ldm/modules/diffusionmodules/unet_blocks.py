"""Building blocks of the diffusion UNet: residual blocks, resampling, attention on feature maps.

Layout and keys follow the UNet of Dhariwal and Nichol (arXiv:2105.05233) as latent diffusion uses it.
Feature maps are (B, C, *spatial) with one, two or three spatial dims; `emb` is the timestep embedding (B, E).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.attention import SpatialTransformer, attention
from ldm.modules.diffusionmodules.util import (
    avg_pool_nd,
    checkpoint,
    conv_nd,
    double_and_convolve,
    linear,
    normalization,
    timestep_embedding,
    zero_module,
)
from ldm.util import ConfigError


class Timestep(nn.Module):
    """Sinusoidal embedding of `dim` channels as a module."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, dim), float32."""
        return timestep_embedding(t, self.dim)


class TimestepBlock(nn.Module, ABC):
    """A module whose forward takes the timestep embedding as its second argument."""

    @abstractmethod
    def forward(self, x: Tensor, emb: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """size: spatial size to come out with, for blocks that go up."""


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """A sequence that hands each member what it understands of the embedding, the context and the size to reach."""

    def forward(
        self,
        x: Tensor,
        emb: Tensor,
        context: Tensor | Sequence[Tensor] | None = None,
        size: Sequence[int] | None = None,
    ) -> Tensor:
        """Run the members in turn; context as SpatialTransformer takes it, size the spatial size to reach going up."""
        for layer in self:
            if isinstance(layer, TimestepBlock):
                x = layer(x, emb, size)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by two (the inner two dims only in 3-D), then a 3x3 convolution if `use_conv`."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1):
        super().__init__()
        self.channels = channels
        self.out_channels = channels if out_channels is None else out_channels
        self.use_conv = use_conv
        self.dims = dims
        if use_conv:
            self.conv = conv_nd(dims, channels, self.out_channels, 3, padding=padding)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """size: the spatial size to reach, default twice the input's; the skip's size when a level was odd."""
        _check_channels(x, self.channels)
        doubled = tuple(n if self.dims == 3 and i == 0 else 2 * n for i, n in enumerate(x.shape[2:]))
        to = doubled if size is None else tuple(size)
        if self.use_conv and self.dims == 2 and to == doubled:
            return double_and_convolve(x, self.conv)
        x = F.interpolate(x, size=to, mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """Halve the size (the inner two dims only in 3-D): a strided 3x3 convolution, or average pooling."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1):
        super().__init__()
        self.channels = channels
        self.out_channels = channels if out_channels is None else out_channels
        self.use_conv = use_conv
        self.dims = dims
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, channels, self.out_channels, 3, stride=stride, padding=padding)
        elif self.out_channels != channels:
            raise ConfigError(f"pooling keeps {channels} channels: out_channels={out_channels} needs use_conv=True")
        else:
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Half the spatial size: an odd one is rounded up by the convolution, down by the pooling."""
        _check_channels(x, self.channels)
        return self.op(x)


def _check_channels(x: Tensor, channels: int) -> None:
    if x.shape[1] != channels:
        raise ValueError(f"got {x.shape[1]} channels, built for {channels}")


class ResBlock(TimestepBlock):
    """Residual block: norm, SiLU, conv, twice, with the timestep embedding added (or scaling and shifting) between."""

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,  # a 3x3 instead of a 1x1 convolution on the skip, where channels change
        use_scale_shift_norm: bool = False,  # the embedding scales and shifts the second norm
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
        num_groups: int = 32,
    ):
        super().__init__()
        self.channels = channels
        self.emb_channels = emb_channels
        self.out_channels = out = channels if out_channels is None else out_channels
        self.use_scale_shift_norm = use_scale_shift_norm
        self.use_checkpoint = use_checkpoint
        self.up = up
        self.updown = up or down
        self.in_layers = nn.Sequential(normalization(channels, num_groups), nn.SiLU(), conv_nd(dims, channels, out, 3, padding=1))
        resample = Upsample if up else Downsample
        self.h_upd = resample(channels, False, dims) if self.updown else nn.Identity()
        self.x_upd = resample(channels, False, dims) if self.updown else nn.Identity()
        self.emb_layers = nn.Sequential(nn.SiLU(), linear(emb_channels, 2 * out if use_scale_shift_norm else out))
        self.out_layers = nn.Sequential(
            normalization(out, num_groups),
            nn.SiLU(),
            nn.Dropout(p=dropout),
            zero_module(conv_nd(dims, out, out, 3, padding=1)),
        )
        if out == channels:
            self.skip_connection = nn.Identity()
        elif use_conv:
            self.skip_connection = conv_nd(dims, channels, out, 3, padding=1)
        else:
            self.skip_connection = conv_nd(dims, channels, out, 1)

    def forward(self, x: Tensor, emb: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """X (B, channels, *spatial), emb (B, emb_channels) -> (B, out_channels, *spatial, resampled if up or down)."""
        return checkpoint(self._forward, (x, emb, size), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor, size: Sequence[int] | None) -> Tensor:
        norm, act, conv = self.in_layers
        h = act(norm(x))
        if self.updown:
            to = (size,) if self.up else ()
            h, x = self.h_upd(h, *to), self.x_upd(x, *to)
        h = conv(h)
        emb_out = self.emb_layers(emb).to(h.dtype)
        emb_out = emb_out.unflatten(1, (-1, *[1] * (h.ndim - 2))) if h.ndim > 2 else emb_out  # (B, E, 1, 1)
        norm, *rest = self.out_layers
        if self.use_scale_shift_norm:
            scale, shift = emb_out.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + emb_out)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(x) + h


class _QKV(nn.Module):
    """Attention over packed projections (B, N*3*D, L) -> (B, N*D, L); `q_first` says how the 3*N*D channels lie."""

    q_first = False

    def __init__(self, n_heads: int, upcast: bool = False):
        super().__init__()
        self.n_heads = n_heads
        self.upcast = upcast

    def forward(self, qkv: Tensor) -> Tensor:
        packed = qkv.transpose(1, 2).contiguous()  # (B, L, 3*N*D): one copy makes D the fast axis of q, k and v
        if self.q_first:
            q, k, v = packed.unflatten(2, (3, self.n_heads, -1)).unbind(2)  # (B, L, N, D)
        else:
            q, k, v = packed.unflatten(2, (self.n_heads, 3, -1)).unbind(3)
        out = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), upcast=self.upcast)
        return out.transpose(1, 2).flatten(2).transpose(1, 2)  # (B, N, L, D) -> (B, N*D, L)


class QKVAttentionLegacy(_QKV):
    """Channels packed head by head: q, k, v of head 0, then of head 1, and so on."""


class QKVAttention(_QKV):
    """Channels packed as all heads' q, then all k, then all v."""

    q_first = True


class AttentionBlock(nn.Module):
    """Self-attention over all positions of a feature map, with a residual connection."""

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,  # takes precedence over num_heads
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
        num_groups: int = 32,
        upcast: bool = False,
    ):
        super().__init__()
        if num_head_channels != -1 and channels % num_head_channels:
            raise ConfigError(f"{channels} channels cannot be split into heads of num_head_channels={num_head_channels}")
        self.channels = channels
        self.num_heads = num_heads if num_head_channels == -1 else channels // num_head_channels
        if channels % self.num_heads:
            raise ConfigError(f"{channels} channels cannot be split into num_heads={num_heads} equal heads")
        self.use_checkpoint = use_checkpoint
        self.norm = normalization(channels, num_groups)
        self.qkv = conv_nd(1, channels, channels * 3, 1)
        self.attention = (QKVAttention if use_new_attention_order else QKVAttentionLegacy)(self.num_heads, upcast)
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, C, *spatial)."""
        return checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        h = self.attention(self.qkv(self.norm(x).flatten(2)))
        return x + self.proj_out(h).reshape(x.shape)


class AttentionPool2d(nn.Module):
    """Pool a (B, C, S, S) map to (B, output_dim): the mean token attends to all positions (CLIP, arXiv:2103.00020)."""

    def __init__(self, spacial_dim: int, embed_dim: int, num_heads_channels: int, output_dim: int | None = None):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(embed_dim, spacial_dim**2 + 1) / embed_dim**0.5)
        self.qkv_proj = conv_nd(1, embed_dim, 3 * embed_dim, 1)
        self.c_proj = conv_nd(1, embed_dim, embed_dim if output_dim is None else output_dim, 1)
        self.num_heads = embed_dim // num_heads_channels
        self.attention = QKVAttention(self.num_heads)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, S, S) -> (B, output_dim)."""
        x = x.flatten(2)
        x = torch.cat([x.mean(dim=-1, keepdim=True), x], dim=-1)  # (B, C, HW + 1)
        x = x + self.positional_embedding[None].to(x.dtype)
        return self.c_proj(self.attention(self.qkv_proj(x)))[:, :, 0]
