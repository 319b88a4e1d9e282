"""The loss of the published KL autoencoders: L1 + LPIPS under a learnt variance, KL, and an adversarial term.

Source: LDM (arXiv:2112.10752), appendix G.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses.adversarial import AdversarialLoss, DummyLoss, Logs, tagged

__all__ = ["DummyLoss", "LPIPSWithDiscriminator"]


class LPIPSWithDiscriminator(AdversarialLoss):
    """Negative log-likelihood, KL and adversarial term; the first two are summed over all elements and averaged over the batch."""

    def __init__(
        self,
        disc_start: int,
        logvar_init: float = 0.0,  # log-variance of a pixel, a parameter (optimised only with learn_logvar)
        kl_weight: float = 1.0,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_loss: str = "hinge",
        perceptual_weights: str | None = None,
    ) -> None:
        super().__init__(
            disc_start,
            pixelloss_weight=pixelloss_weight,
            disc_num_layers=disc_num_layers,
            disc_in_channels=disc_in_channels,
            disc_factor=disc_factor,
            disc_weight=disc_weight,
            perceptual_weight=perceptual_weight,
            use_actnorm=use_actnorm,
            disc_conditional=disc_conditional,
            disc_loss=disc_loss,
            perceptual_weights=perceptual_weights,
        )
        self.kl_weight = kl_weight
        self.logvar = nn.Parameter(torch.ones(()) * logvar_init)

    def forward(
        self,
        inputs: Tensor,  # (B, C, H, W) in [-1, 1]
        reconstructions: Tensor,
        posteriors: DiagonalGaussianDistribution,
        optimizer_idx: int,  # 0 generator, 1 discriminator
        global_step: int,
        last_layer: Tensor | None = None,
        cond: Tensor | None = None,
        split: str = "train",
        weights: Tensor | None = None,  # of the elements' likelihood, broadcast to (B, C, H, W)
    ) -> tuple[Tensor, Logs]:
        """Loss of one of the two players, and what to log, under `split`/."""
        if optimizer_idx == 1:
            loss, logs = self.discriminator_term(inputs, reconstructions, global_step, cond)
            return loss, tagged(split, logs)
        batch = inputs.shape[0]
        pixel = (inputs - reconstructions).abs()
        rec_loss, _ = self.pixel_and_perceptual(inputs, reconstructions, pixel)
        nll = rec_loss / self.logvar.exp() + self.logvar
        weighted_nll_loss = (nll if weights is None else weights * nll).sum() / batch
        nll_loss = nll.sum() / batch
        kl_loss = posteriors.kl().sum() / batch
        adversarial, logs = self.generator_term(nll_loss, reconstructions, global_step, last_layer, cond)
        loss = weighted_nll_loss + self.kl_weight * kl_loss + adversarial
        logs |= {"total_loss": loss, "logvar": self.logvar, "kl_loss": kl_loss, "nll_loss": nll_loss, "rec_loss": rec_loss.mean()}
        return loss, tagged(split, logs)
