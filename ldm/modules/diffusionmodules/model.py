"""Convolutional encoder, decoder and pixel UNet (the networks of the first stage).

Owns the layers and their state-dict names; knows nothing of latents' distributions, losses or training. Attention levels are chosen by
bookkeeping on the nominal `resolution`, so one set of weights takes every image size that the downsampling factor divides.

Sources: DDPM (arXiv:2006.11239), VQGAN (arXiv:2012.09841), LDM (arXiv:2112.10752), linear attention (arXiv:1812.01243).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.util import ConfigError

# Keys that published ddconfigs carry for the other half of the autoencoder, or that have no effect any more.
_SHARED_KEYS = frozenset({"double_z", "out_ch", "in_channels", "give_pre_end", "tanh_out", "resolution", "use_linear_attn"})
_ATTENTION_TYPES = ("vanilla", "linear", "none")
_ATTENTION_ALIASES = {"vanilla-xformers": "vanilla"}  # the same numbers: one attention() serves both


def get_timestep_embedding(timesteps: Tensor, embedding_dim: int) -> Tensor:
    """Sinusoidal embedding of integer timesteps (B,) as (B, embedding_dim): sines first, then cosines, zero-padded if odd."""
    half = embedding_dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) * (-math.log(10000) / (half - 1))
    angles = timesteps.float()[:, None] * exponents.exp()[None, :]  # (B, half)
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return F.pad(embedding, (0, embedding_dim - 2 * half))


def nonlinearity(x: Tensor) -> Tensor:
    """SiLU (swish)."""
    return F.silu(x)


def Normalize(in_channels: int, num_groups: int = 32) -> nn.GroupNorm:
    """GroupNorm with eps 1e-6 (not torch's 1e-5). Raises ConfigError if `num_groups` does not divide `in_channels`."""
    if in_channels % num_groups:
        raise ConfigError(f"{in_channels} channels do not split into num_groups={num_groups}: set ddconfig.num_groups to a divisor")
    return nn.GroupNorm(num_groups, in_channels, eps=1e-6, affine=True)


class Upsample(nn.Module):
    """Nearest-neighbour doubling of height and width, then an optional 3x3 convolution."""

    def __init__(self, in_channels: int, with_conv: bool) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2H, 2W)."""
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if self.with_conv else x


class Downsample(nn.Module):
    """Halves height and width: a strided 3x3 convolution padded at the right and bottom only, or average pooling."""

    def __init__(self, in_channels: int, with_conv: bool) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H/2, W/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1))) if self.with_conv else F.avg_pool2d(x, 2)


class ResnetBlock(nn.Module):
    """Two pre-activated 3x3 convolutions with a shortcut; a time embedding is added between them if there is one."""

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int | None = None,  # default: in_channels
        conv_shortcut: bool = False,  # 3x3 instead of 1x1 shortcut where the channel count changes
        dropout: float,
        temb_channels: int = 512,  # 0: no time embedding
        num_groups: int = 32,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        self.in_channels, self.out_channels, self.use_conv_shortcut = in_channels, out_channels, conv_shortcut
        self.norm1 = Normalize(in_channels, num_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_channels > 0:
            self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = Normalize(out_channels, num_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels and conv_shortcut:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        elif in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H, W); `temb` is (B, temb_channels) or None."""
        h = self.conv1(nonlinearity(self.norm1(x)))
        if temb is not None:
            h = h + self.temb_proj(nonlinearity(temb))[:, :, None, None]
        h = self.conv2(self.dropout(nonlinearity(self.norm2(h))))
        if self.in_channels != self.out_channels:
            x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
        return x + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, with residual. 1x1 convolutions keep the published key shapes."""

    def __init__(self, in_channels: int, num_groups: int = 32) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.norm = Normalize(in_channels, num_groups)
        self.q = nn.Conv2d(in_channels, in_channels, 1)
        self.k = nn.Conv2d(in_channels, in_channels, 1)
        self.v = nn.Conv2d(in_channels, in_channels, 1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        b, c, height, width = x.shape
        h = self.norm(x)
        # (B, 1, HW, C); contiguous rows make attention 15 to 25 % faster on the CPU, and are there already in channels_last
        q, k, v = (layer(h).flatten(2).transpose(1, 2).contiguous().unsqueeze(1) for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # scale C^-1/2
        h = h.squeeze(1).transpose(1, 2).reshape(b, c, height, width)
        return x + self.proj_out(h)


class LinearAttention(nn.Module):
    """Attention of linear cost: softmax over the keys' positions, then q against the (D, D) context (arXiv:1812.01243)."""

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Conv2d(dim, heads * dim_head * 3, 1, bias=False)
        self.to_out = nn.Conv2d(heads * dim_head, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        b, _, height, width = x.shape
        q, k, v = self.to_qkv(x).reshape(b, 3, self.heads, -1, height * width).unbind(1)  # (B, heads, D, HW)
        context = k.softmax(dim=-1) @ v.transpose(-1, -2)  # (B, heads, D, D)
        out = context.transpose(-1, -2) @ q  # (B, heads, D, HW)
        return self.to_out(out.reshape(b, -1, height, width))


class LinAttnBlock(LinearAttention):
    """LinearAttention with one head of full width, the drop-in for AttnBlock (no normalisation, no residual, as published)."""

    def __init__(self, in_channels: int) -> None:
        super().__init__(dim=in_channels, heads=1, dim_head=in_channels)


def make_attn(in_channels: int, attn_type: str = "vanilla", num_groups: int = 32) -> nn.Module:
    """Attention layer by name: "vanilla", "linear" or "none" ("vanilla-xformers" is vanilla)."""
    attn_type = _ATTENTION_ALIASES.get(attn_type, attn_type)
    if attn_type == "vanilla":
        return AttnBlock(in_channels, num_groups)
    if attn_type == "linear":
        return LinAttnBlock(in_channels)
    if attn_type == "none":
        return nn.Identity()
    allowed = ", ".join((*_ATTENTION_TYPES, *_ATTENTION_ALIASES))
    raise ConfigError(f"attn_type={attn_type!r} is not known: use one of {allowed}")


class _Parts:
    """What every block of one network has in common, and how the blocks are put together."""

    def __init__(
        self, dropout: float, temb_channels: int, attn_resolutions: Sequence[int], attn_type: str, with_conv: bool, num_groups: int
    ) -> None:
        self.dropout, self.temb_channels, self.num_groups = dropout, temb_channels, num_groups
        self.attn_resolutions, self.attn_type, self.with_conv = tuple(attn_resolutions), attn_type, with_conv

    def resnet(self, c_in: int, c_out: int) -> ResnetBlock:
        return ResnetBlock(
            in_channels=c_in,
            out_channels=c_out,
            dropout=self.dropout,
            temb_channels=self.temb_channels,
            num_groups=self.num_groups,
        )

    def attention(self, channels: int) -> nn.Module:
        return make_attn(channels, self.attn_type, self.num_groups)

    def level(self, inputs: Sequence[int], channels: int, resolution: int) -> nn.Module:
        """One resolution level: residual blocks from `inputs[i]` to `channels`, each followed by attention where asked for."""
        level = nn.Module()
        level.block = nn.ModuleList(self.resnet(c_in, channels) for c_in in inputs)
        with_attention = resolution in self.attn_resolutions
        level.attn = nn.ModuleList(self.attention(channels) for _ in inputs if with_attention)
        return level

    def middle(self, channels: int) -> nn.Module:
        mid = nn.Module()
        mid.block_1 = self.resnet(channels, channels)
        mid.attn_1 = self.attention(channels)
        mid.block_2 = self.resnet(channels, channels)
        return mid

    def down_path(self, widths: Sequence[int], c_in: int, num_res_blocks: int, resolution: int) -> nn.ModuleList:
        levels = nn.ModuleList()
        for i, channels in enumerate(widths):
            level = self.level([c_in] + [channels] * (num_res_blocks - 1), channels, resolution)
            if i < len(widths) - 1:
                level.downsample = Downsample(channels, self.with_conv)
                resolution //= 2
            levels.append(level)
            c_in = channels
        return levels


def _run_level(level: nn.Module, i: int, h: Tensor, temb: Tensor | None) -> Tensor:
    h = level.block[i](h, temb)
    return level.attn[i](h) if len(level.attn) else h


def _run_middle(mid: nn.Module, h: Tensor, temb: Tensor | None) -> Tensor:
    return mid.block_2(mid.attn_1(mid.block_1(h, temb)), temb)


def _reject_unknown(owner: str, extra: dict[str, Any]) -> None:
    unknown = sorted(set(extra) - _SHARED_KEYS)
    if unknown:
        raise ConfigError(f"{owner} does not know {', '.join(unknown)}: remove it from ddconfig (see the arguments of {owner})")


class Model(nn.Module):
    """The DDPM UNet: predicts (B, out_ch, H, W) from a noisy image (B, in_channels, H, W) and timesteps (B,)."""

    def __init__(
        self,
        *,
        ch: int,  # base width
        out_ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),  # width of each level, in multiples of ch
        num_res_blocks: int,  # per level on the way down; one more on the way up
        attn_resolutions: Sequence[int],  # nominal resolutions (pixels, not factors) that get attention
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,  # nominal input size, only for attn_resolutions
        use_timestep: bool = True,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        num_groups: int = 32,
    ) -> None:
        super().__init__()
        self.ch, self.temb_ch, self.use_timestep = ch, ch * 4, use_timestep
        self.num_resolutions, self.num_res_blocks = len(ch_mult), num_res_blocks
        self.resolution, self.in_channels = resolution, in_channels
        attn_type = "linear" if use_linear_attn else attn_type
        parts = _Parts(dropout, self.temb_ch, attn_resolutions, attn_type, resamp_with_conv, num_groups)
        widths = [ch * m for m in ch_mult]
        if use_timestep:
            self.temb = nn.Module()
            self.temb.dense = nn.ModuleList([nn.Linear(ch, self.temb_ch), nn.Linear(self.temb_ch, self.temb_ch)])
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = parts.down_path(widths, ch, num_res_blocks, resolution)
        self.mid = parts.middle(widths[-1])
        self.up = self._up_path(parts, widths, resolution)
        self.norm_out = Normalize(widths[0], num_groups)
        self.conv_out = nn.Conv2d(widths[0], out_ch, 3, padding=1)

    def _up_path(self, parts: _Parts, widths: Sequence[int], resolution: int) -> nn.ModuleList:
        levels, c_in = [], widths[-1]
        for i in reversed(range(len(widths))):
            skips = [widths[i]] * self.num_res_blocks + [widths[i - 1] if i else self.ch]  # the last skip is one level up
            before = [c_in] + [widths[i]] * self.num_res_blocks
            level = parts.level([a + b for a, b in zip(before, skips, strict=True)], widths[i], resolution >> i)
            if i:
                level.upsample = Upsample(widths[i], parts.with_conv)
            levels.insert(0, level)
            c_in = widths[i]
        return nn.ModuleList(levels)

    def _time_embedding(self, t: Tensor | None) -> Tensor | None:
        if not self.use_timestep:
            return None
        if t is None:
            raise ValueError("this Model was built with use_timestep=True: pass t, integer timesteps of shape (B,)")
        first, second = self.temb.dense
        embedding = get_timestep_embedding(t, self.ch).to(first.weight.dtype)
        return second(nonlinearity(first(embedding)))

    def forward(self, x: Tensor, t: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """`context` (B, C, H, W) is concatenated to x along the channels."""
        if context is not None:
            x = torch.cat((x, context), dim=1)
        temb = self._time_embedding(t)
        skips = [self.conv_in(x)]
        for level in self.down:
            for i in range(self.num_res_blocks):
                skips.append(_run_level(level, i, skips[-1], temb))
            if hasattr(level, "downsample"):
                skips.append(level.downsample(skips[-1]))
        h = _run_middle(self.mid, skips[-1], temb)
        for level in reversed(self.up):
            for i in range(self.num_res_blocks + 1):
                h = _run_level(level, i, torch.cat([h, skips.pop()], dim=1), temb)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(nonlinearity(self.norm_out(h)))

    def get_last_layer(self) -> nn.Parameter:
        """The last convolution's weight."""
        return self.conv_out.weight


class Encoder(nn.Module):
    """Image (B, in_channels, H, W) to (B, z_channels or 2 z_channels, H/f, W/f) with f = patch_size * 2^(len(ch_mult) - 1)."""

    def __init__(
        self,
        *,
        ch: int,  # base width
        ch_mult: Sequence[int] = (1, 2, 4, 8),  # width of each level, in multiples of ch
        num_res_blocks: int,  # per level
        attn_resolutions: Sequence[int],  # nominal resolutions (pixels, not factors) that get attention
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,  # nominal input size, only for attn_resolutions
        z_channels: int,
        double_z: bool = True,  # mean and log-variance
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        num_groups: int = 32,  # of every GroupNorm
        patch_size: int = 1,  # pixels are first gathered in squares of this side: a cheap first halving or two
        **other_half: Any,  # keys of the decoder, since both take the same ddconfig
    ) -> None:
        super().__init__()
        _reject_unknown("Encoder", other_half)
        self.num_resolutions, self.num_res_blocks = len(ch_mult), num_res_blocks
        self.ch, self.resolution, self.in_channels = ch, resolution, in_channels
        attn_type = "linear" if use_linear_attn else attn_type
        parts = _Parts(dropout, 0, attn_resolutions, attn_type, resamp_with_conv, num_groups)
        widths = [ch * m for m in ch_mult]
        self.patch_size = patch_size
        self.conv_in = nn.Conv2d(in_channels * patch_size**2, ch, 3, padding=1)
        self.down = parts.down_path(widths, ch, num_res_blocks, resolution // patch_size)
        self.mid = parts.middle(widths[-1])
        self.norm_out = Normalize(widths[-1], num_groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Image to moments (or latent)."""
        h = self.conv_in(F.pixel_unshuffle(x, self.patch_size) if self.patch_size > 1 else x)
        for level in self.down:
            for i in range(self.num_res_blocks):
                h = _run_level(level, i, h, None)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        h = _run_middle(self.mid, h, None)
        return self.conv_out(nonlinearity(self.norm_out(h)))


class Decoder(nn.Module):
    """Latent (B, z_channels, h, w) to image (B, out_ch, f h, f w) with f = patch_size * 2^(len(ch_mult) - 1)."""

    def __init__(
        self,
        *,
        ch: int,  # base width
        out_ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),  # width of each level, in multiples of ch; the last is the smallest grid
        num_res_blocks: int,  # as for the encoder; the decoder has one more per level
        attn_resolutions: Sequence[int],  # nominal resolutions (pixels, not factors) that get attention
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        resolution: int,  # nominal image size, only for attn_resolutions
        z_channels: int,
        give_pre_end: bool = False,  # return the features before the last norm and convolution
        tanh_out: bool = False,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        num_groups: int = 32,  # of every GroupNorm
        patch_size: int = 1,  # the last convolution draws squares of this side, see Encoder
        **other_half: Any,  # keys of the encoder, since both take the same ddconfig
    ) -> None:
        super().__init__()
        _reject_unknown("Decoder", other_half)
        self.num_resolutions, self.num_res_blocks = len(ch_mult), num_res_blocks
        self.ch, self.resolution = ch, resolution
        self.give_pre_end, self.tanh_out = give_pre_end, tanh_out
        attn_type = "linear" if use_linear_attn else attn_type
        parts = _Parts(dropout, 0, attn_resolutions, attn_type, resamp_with_conv, num_groups)
        widths = [ch * m for m in ch_mult]
        self.patch_size = patch_size
        resolution //= patch_size
        self.z_shape = (1, z_channels, resolution >> (len(widths) - 1), resolution >> (len(widths) - 1))
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = parts.middle(widths[-1])
        self.up = nn.ModuleList()
        for i, channels in enumerate(widths):
            c_in = widths[min(i + 1, len(widths) - 1)]
            level = parts.level([c_in] + [channels] * num_res_blocks, channels, resolution >> i)
            if i:
                level.upsample = Upsample(channels, resamp_with_conv)
            self.up.append(level)
        self.norm_out = Normalize(widths[0], num_groups)
        self.conv_out = nn.Conv2d(widths[0], out_ch * patch_size**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Latent to image."""
        h = _run_middle(self.mid, self.conv_in(z), None)
        for level in reversed(self.up):
            for i in range(self.num_res_blocks + 1):
                h = _run_level(level, i, h, None)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        if self.give_pre_end:
            return h
        h = self.conv_out(nonlinearity(self.norm_out(h)))
        h = F.pixel_shuffle(h, self.patch_size) if self.patch_size > 1 else h
        return h.tanh() if self.tanh_out else h
