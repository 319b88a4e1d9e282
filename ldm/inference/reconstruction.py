"""Pictures through a first stage: encode, decode, measure, and show the latent. Knows no flags and writes no files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.imaging import to_tensor, to_uint8
from ldm.inference.checkpoint import load_weights
from ldm.inference.facts import read_config
from ldm.inference.first_stage import first_stage_config
from ldm.models.first_stage import psnr
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import UserError, instantiate_from_config


@dataclass(frozen=True)
class Reconstruction:
    """What a first stage makes of one picture."""

    image: np.ndarray  # uint8 (H, W, 3)
    latent: np.ndarray  # uint8 (H, W, 3): the first three principal components of the latent
    psnr: float  # dB, of the clamped reconstruction against the picture
    shape: tuple[int, int, int]  # of the latent, (C, h, w)


def load_first_stage(
    config: str | Path | Mapping[str, Any], ckpt: str | Path, device: str | torch.device = "cpu", ema: str = "auto"
) -> Any:
    """The autoencoder of `ckpt`, a file or diffusers folder of its own or of a whole model: float32, in eval mode, on `device`."""
    stage = instantiate_from_config(first_stage_config(read_config(config)["model"]))
    load_weights(stage, ckpt, ema=ema)
    return stage.float().eval().requires_grad_(False).to(device)


@torch.inference_mode()
def reconstruct(stage: Any, image: np.ndarray) -> Reconstruction:
    """uint8 (H, W, 3) through `stage` and back; of a Gaussian latent the mode. Raises `UserError` when numbers overflow."""
    device = next(stage.parameters()).device
    x = to_tensor(image).to(device)  # (1, 3, H, W)
    z = encode(stage, x)
    y = stage.decode(z)
    if not torch.isfinite(y).all():
        raise UserError("the first stage gave NaN or infinite numbers: the weights are damaged, or do not fit the config")
    return Reconstruction(to_uint8(y[0]), latent_picture(z[0], *image.shape[:2]), float(psnr(y, x)), (z.shape[1], z.shape[2], z.shape[3]))


def encode(stage: Any, x: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> what `stage.decode` takes: the mode of a posterior, or the (quantised) latent."""
    encoded = stage.posterior(x) if hasattr(stage, "posterior") else stage.encode(x)
    if isinstance(encoded, DiagonalGaussianDistribution):
        return encoded.mode()
    return encoded[0] if isinstance(encoded, tuple) else encoded


def latent_picture(z: Tensor, height: int, width: int) -> np.ndarray:
    """Latent (C, h, w) as uint8 (height, width, 3): its first three principal components as red, green and blue.

    Each component is scaled from its 1st to its 99th percentile, and turned so that its largest loading is positive.
    """
    values = z.detach().float().cpu().flatten(1).T.double()  # (h w, C)
    values = values - values.mean(dim=0)
    axes = torch.linalg.eigh(values.T @ values).eigenvectors.flip(1)[:, :3]  # (C, at most 3), largest variance first
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    scores = F.pad(values @ axes, (0, 3 - axes.shape[1]))  # (h w, 3)
    low, high = torch.quantile(scores, 0.01, dim=0), torch.quantile(scores, 0.99, dim=0)
    unit = ((scores - low) / (high - low).clamp_min(1e-8)).clamp(0.0, 1.0)
    picture = unit.T.reshape(1, 3, *z.shape[1:]).float() * 2.0 - 1.0
    return to_uint8(F.interpolate(picture, size=(height, width), mode="nearest")[0])
