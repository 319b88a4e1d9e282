"""A network without weights whose output is a formula, and the latent model around it that the stored numbers were made with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.diffusion.ddpm import LatentDiffusion


class AnalyticEps(nn.Module):
    """eps(x, t, c) = tanh(0.7 x + c + t / 1000).

    c is the first `channels` numbers of the first context token. Channels of x beyond `channels` (concatenated conditions) add a
    tenth of their mean, a vector `y` adds a twentieth of its own.
    """

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        x, extra = x[:, : self.channels], x[:, self.channels :]  # (B, C, H, W), (B, E, H, W)
        total = 0.7 * x + timesteps.to(x.dtype)[:, None, None, None] / 1000
        if extra.shape[1]:
            total = total + 0.1 * extra.mean(1, keepdim=True)
        if context is not None:
            total = total + context[:, 0, : self.channels, None, None]  # context (B, L, D)
        if y is not None:
            total = total + 0.05 * y.to(x.dtype).reshape(len(x), -1).mean(1)[:, None, None, None]
        return torch.tanh(total)


# Stable Diffusion's noise schedule and scale on latents of 4x8x8, the conditioning handed through as it is.
LATENT_PARAMS: dict[str, Any] = {
    "linear_start": 0.00085,
    "linear_end": 0.0120,
    "timesteps": 1000,
    "log_every_t": 200,
    "first_stage_key": "image",
    "cond_stage_key": "caption",
    "image_size": 8,
    "channels": 4,
    "conditioning_key": "crossattn",
    "scale_factor": 0.18215,
    "use_ema": False,
    "unet_config": {"target": "tests.analytic.AnalyticEps"},
    "first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"},
    "cond_stage_config": {"target": "torch.nn.Identity"},
}


def latent_model(**changes: Any) -> LatentDiffusion:
    """A LatentDiffusion of `LATENT_PARAMS` with some of them changed."""
    return LatentDiffusion(**(LATENT_PARAMS | changes))


class LengthEncoder(nn.Module):
    """Texts -> (B, 1, 4): the length of the text times a learnt vector, plus another one. The empty text is exactly `bias`."""

    def __init__(self, width: int = 4, frozen: bool = False) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.full((width,), 0.1)), nn.Parameter(torch.arange(width) / 10)
        self.dropout = nn.Dropout(0.5)  # would show if a frozen one were woken
        self.requires_grad_(not frozen)

    def encode(self, texts: list[str]) -> Tensor:
        lengths = torch.tensor([len(text) for text in texts], dtype=self.scale.dtype)
        return self.dropout(lengths[:, None, None] * self.scale + self.bias)
