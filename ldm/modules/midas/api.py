"""Public address of the depth model: configs name `ldm.modules.midas.api.MiDaSInference`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.freezing import freeze
from ldm.modules.midas.dpt import DPTHybrid
from ldm.util import ConfigError, UserError

__all__ = ["MiDaSInference"]


class MiDaSInference(nn.Module):
    """Frozen depth model. Its weights come with the checkpoint of the whole model (`depth_model.*`) or from a local file."""

    def __init__(
        self,
        model_type: str = "dpt_hybrid",  # the one that published models use, and the only one here
        path: str | None = None,  # a local MiDaS 3 weights file, such as dpt_hybrid-midas-501f0c75.pt
    ) -> None:
        super().__init__()
        if model_type != "dpt_hybrid":
            raise ConfigError(f"MiDaS model_type {model_type!r} is not supported; use dpt_hybrid, which Stable Diffusion 2 depth has")
        self.model = DPTHybrid()
        if path is not None and not self.model.pretrained.model.pos_embed.is_meta:
            from ldm.inference.checkpoint import load_weights  # lies above this layer

            load_weights(self.model, path)
        freeze(self.model)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] -> relative inverse depth (B, 1, H, W). H and W are multiples of 32, at best 384."""
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % 32 or x.shape[3] % 32:
            raise UserError(f"the depth model takes (B, 3, H, W) with H and W multiples of 32, such as 384, not {tuple(x.shape)}")
        return F.interpolate(self.model(x), size=x.shape[2:], mode="bicubic", align_corners=False)
