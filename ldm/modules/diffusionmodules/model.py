"""Convolutional encoder, decoder and pixel UNet (the networks of the first stage), and the public address of their blocks.

Owns how blocks become networks; the blocks are those of `stage_blocks`. Knows nothing of latents' distributions, losses or training.
Attention levels are chosen by bookkeeping on the nominal `resolution`, so one set of weights takes every image size that the
downsampling factor divides.

Sources: DDPM (arXiv:2006.11239), VQGAN (arXiv:2012.09841), LDM (arXiv:2112.10752).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.attention import LinearAttention
from ldm.modules.diffusionmodules.stage_blocks import (
    AttnBlock,
    Downsample,
    LinAttnBlock,
    Normalize,
    Parts,
    ResnetBlock,
    Upsample,
    make_attn,
    nonlinearity,
    run_level,
    run_middle,
)
from ldm.util import ConfigError

__all__ = [
    "AttnBlock",
    "Decoder",
    "Downsample",
    "Encoder",
    "LinAttnBlock",
    "LinearAttention",
    "Model",
    "Normalize",
    "ResnetBlock",
    "Upsample",
    "get_timestep_embedding",
    "make_attn",
    "nonlinearity",
]

# Keys that published ddconfigs carry for the other half of the autoencoder, or that have no effect any more.
_SHARED_KEYS = frozenset({"double_z", "out_ch", "in_channels", "give_pre_end", "tanh_out", "resolution", "use_linear_attn"})


def get_timestep_embedding(timesteps: Tensor, embedding_dim: int) -> Tensor:
    """Sinusoidal embedding of integer timesteps (B,) as (B, embedding_dim): sines first, then cosines, zero-padded if odd."""
    half = embedding_dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) * (-math.log(10000) / (half - 1))
    angles = timesteps.float()[:, None] * exponents.exp()[None, :]  # (B, half)
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return F.pad(embedding, (0, embedding_dim - 2 * half))


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
        parts = Parts(dropout, self.temb_ch, attn_resolutions, attn_type, resamp_with_conv, num_groups)
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

    def _up_path(self, parts: Parts, widths: Sequence[int], resolution: int) -> nn.ModuleList:
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
                skips.append(run_level(level, i, skips[-1], temb))
            if hasattr(level, "downsample"):
                skips.append(level.downsample(skips[-1]))
        h = run_middle(self.mid, skips[-1], temb)
        for level in reversed(self.up):
            for i in range(self.num_res_blocks + 1):
                h = run_level(level, i, torch.cat([h, skips.pop()], dim=1), temb)
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
        parts = Parts(dropout, 0, attn_resolutions, attn_type, resamp_with_conv, num_groups)
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
                h = run_level(level, i, h, None)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        h = run_middle(self.mid, h, None)
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
        parts = Parts(dropout, 0, attn_resolutions, attn_type, resamp_with_conv, num_groups)
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
        h = run_middle(self.mid, self.conv_in(z), None)
        for level in reversed(self.up):
            for i in range(self.num_res_blocks + 1):
                h = run_level(level, i, h, None)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        if self.give_pre_end:
            return h
        h = self.conv_out(nonlinearity(self.norm_out(h)))
        h = F.pixel_shuffle(h, self.patch_size) if self.patch_size > 1 else h
        return h.tanh() if self.tanh_out else h
