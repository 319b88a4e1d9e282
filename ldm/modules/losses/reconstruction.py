"""The plain loss of a KL autoencoder: pixels and a Kullback-Leibler term, no network of its own (so no state-dict keys)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import ConfigError

_PIXEL_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.smooth_l1_loss}


class ReconstructionKL(nn.Module):
    """mean pixel error + kl_weight * KL, both per image and averaged over the batch.

    The pixel error is a mean over channels and positions, the KL a sum over the latent's elements (nats per image); so the same
    trade-off as in LPIPSWithDiscriminator, which sums both, needs `kl_weight` divided by the number of pixel values.
    """

    def __init__(
        self,
        pixel_loss: str = "l1",  # l1, l2 or huber (quadratic below 1)
        kl_weight: float = 1e-6,
        pixel_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if pixel_loss not in _PIXEL_LOSSES:
            raise ConfigError(f"pixel_loss={pixel_loss!r} is not known: use one of {', '.join(_PIXEL_LOSSES)}")
        self.pixel_loss, self.kl_weight, self.pixel_weight = pixel_loss, kl_weight, pixel_weight

    def forward(
        self,
        inputs: Tensor,  # (B, C, H, W)
        reconstructions: Tensor,
        posteriors: DiagonalGaussianDistribution,
        optimizer_idx: int = 0,
        global_step: int = 0,
        last_layer: Tensor | None = None,
        split: str = "train",
        **_: Any,  # the signature all first-stage losses share; nothing more is needed here
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (scalar) and what to log, under `split`/."""
        if optimizer_idx != 0:
            raise ValueError(f"ReconstructionKL has no discriminator: optimizer_idx must be 0, not {optimizer_idx}")
        rec_loss = _PIXEL_LOSSES[self.pixel_loss](reconstructions.float(), inputs.float())
        kl_loss = posteriors.kl().mean()
        loss = self.pixel_weight * rec_loss + self.kl_weight * kl_loss
        logs = {"total_loss": loss, "rec_loss": rec_loss, "kl_loss": kl_loss}
        return loss, {f"{split}/{name}": value.detach() for name, value in logs.items()}
