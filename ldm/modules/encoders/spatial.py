"""Images as conditioning that keeps its layout, such as label maps: scaled to the size of the latent."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.util import ConfigError

METHODS = ("nearest", "linear", "bilinear", "trilinear", "bicubic", "area")


class SpatialRescaler(nn.Module):
    """(B, C, H, W) scaled `n_stages` times by `multiplier`; then, if `out_channels` is given, a 1x1 convolution."""

    def __init__(
        self,
        n_stages: int = 1,
        method: str = "bilinear",  # one of METHODS; not antialiased
        multiplier: float = 0.5,  # of H and W, each stage
        in_channels: int = 3,  # of the 1x1 convolution
        out_channels: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if n_stages < 0:
            raise ConfigError(f"SpatialRescaler: n_stages {n_stages} must be 0 or more")
        if method not in METHODS:
            raise ConfigError(f"SpatialRescaler: method {method!r} is unknown; use {', '.join(METHODS)}")
        self.n_stages, self.method, self.multiplier = n_stages, method, multiplier
        self.remap_output = out_channels is not None
        if out_channels is not None:
            self.channel_mapper = nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_channels or C, H', W')."""
        for _ in range(self.n_stages):
            x = F.interpolate(x, scale_factor=self.multiplier, mode=self.method)
        return self.channel_mapper(x) if self.remap_output else x

    def encode(self, x: Tensor) -> Tensor:
        """As calling the module."""
        return self(x)
