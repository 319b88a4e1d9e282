"""Building blocks of the first stage's encoder and decoder: residual blocks, resampling, attention, levels.

Owns the layers and their state-dict names; which of them stand where is decided in `model`. Sources: DDPM (arXiv:2006.11239), VQGAN
(arXiv:2012.09841), linear attention (arXiv:1812.01243).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.attention import LinearAttention, SpatialSelfAttention
from ldm.modules.diffusionmodules.util import double_and_convolve
from ldm.util import ConfigError

_ATTENTION_TYPES = ("vanilla", "linear", "none")
_ATTENTION_ALIASES = {"vanilla-xformers": "vanilla"}  # the same numbers: one attention() serves both


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
        return double_and_convolve(x, self.conv) if self.with_conv else F.interpolate(x, scale_factor=2.0, mode="nearest")


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


class AttnBlock(SpatialSelfAttention):
    """Single-head self-attention over all positions, with residual; normalised in the weights' type, as all of a first stage is."""

    def __init__(self, in_channels: int, num_groups: int = 32) -> None:
        super().__init__(in_channels, num_groups)
        self.norm = Normalize(in_channels, num_groups)


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


class Parts:
    """What every block of one network has in common, and how the blocks are put together."""

    def __init__(
        self, dropout: float, temb_channels: int, attn_resolutions: Sequence[int], attn_type: str, with_conv: bool, num_groups: int
    ) -> None:
        self.dropout, self.temb_channels, self.num_groups = dropout, temb_channels, num_groups
        self.attn_resolutions, self.attn_type, self.with_conv = tuple(attn_resolutions), attn_type, with_conv

    def resnet(self, c_in: int, c_out: int) -> ResnetBlock:
        """A residual block."""
        return ResnetBlock(
            in_channels=c_in,
            out_channels=c_out,
            dropout=self.dropout,
            temb_channels=self.temb_channels,
            num_groups=self.num_groups,
        )

    def attention(self, channels: int) -> nn.Module:
        """An attention layer."""
        return make_attn(channels, self.attn_type, self.num_groups)

    def level(self, inputs: Sequence[int], channels: int, resolution: int) -> nn.Module:
        """One resolution level: residual blocks from `inputs[i]` to `channels`, each followed by attention where asked for."""
        level = nn.Module()
        level.block = nn.ModuleList(self.resnet(c_in, channels) for c_in in inputs)
        with_attention = resolution in self.attn_resolutions
        level.attn = nn.ModuleList(self.attention(channels) for _ in inputs if with_attention)
        return level

    def middle(self, channels: int) -> nn.Module:
        """The blocks at the lowest resolution."""
        mid = nn.Module()
        mid.block_1 = self.resnet(channels, channels)
        mid.attn_1 = self.attention(channels)
        mid.block_2 = self.resnet(channels, channels)
        return mid

    def down_path(self, widths: Sequence[int], c_in: int, num_res_blocks: int, resolution: int) -> nn.ModuleList:
        """All levels on the way down, `c_in` channels wide at its beginning."""
        levels = nn.ModuleList()
        for i, channels in enumerate(widths):
            level = self.level([c_in] + [channels] * (num_res_blocks - 1), channels, resolution)
            if i < len(widths) - 1:
                level.downsample = Downsample(channels, self.with_conv)
                resolution //= 2
            levels.append(level)
            c_in = channels
        return levels


def run_level(level: nn.Module, i: int, h: Tensor, temb: Tensor | None) -> Tensor:
    """The i-th residual block of a level, and its attention if it has one."""
    h = level.block[i](h, temb)
    return level.attn[i](h) if len(level.attn) else h


def run_middle(mid: nn.Module, h: Tensor, temb: Tensor | None) -> Tensor:
    """What `Parts.middle` made."""
    return mid.block_2(mid.attn_1(mid.block_1(h, temb)), temb)
