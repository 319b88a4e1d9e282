"""The loss of the published VQ autoencoders: pixels + LPIPS, codebook, and an adversarial term.

Source: VQGAN (arXiv:2012.09841), Eq. 4 to 7.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ldm.modules.losses.adversarial import (
    AdversarialLoss,
    DummyLoss,
    Logs,
    adopt_weight,
    hinge_d_loss,
    tagged,
    vanilla_d_loss,
)
from ldm.util import ConfigError

__all__ = ["DummyLoss", "VQLPIPSWithDiscriminator", "adopt_weight", "hinge_d_loss", "measure_perplexity", "vanilla_d_loss"]


def measure_perplexity(predicted_indices: Tensor, n_embed: int) -> tuple[Tensor, Tensor]:
    """Perplexity of the codebook's use (`n_embed` if even), and how many entries were used."""
    counts = predicted_indices.reshape(-1).bincount(minlength=n_embed).float()
    probabilities = counts / counts.sum()
    perplexity = (-(probabilities * (probabilities + 1e-10).log()).sum()).exp()
    return perplexity, (counts > 0).sum()


class VQLPIPSWithDiscriminator(AdversarialLoss):
    """Mean pixel and perceptual error, codebook loss and adversarial term."""

    def __init__(
        self,
        disc_start: int,
        codebook_weight: float = 1.0,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_ndf: int = 64,
        disc_loss: str = "hinge",
        n_classes: int | None = None,  # codebook size: logs its perplexity and use
        perceptual_loss: str = "lpips",
        pixel_loss: str = "l1",
        perceptual_weights: str | None = None,
    ) -> None:
        if perceptual_loss != "lpips":
            raise ConfigError(f"perceptual_loss={perceptual_loss!r} is not known: use lpips (or perceptual_weight: 0)")
        if pixel_loss not in ("l1", "l2"):
            raise ConfigError(f"pixel_loss={pixel_loss!r} is not known: use l1 or l2")
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
            disc_ndf=disc_ndf,
            disc_loss=disc_loss,
            perceptual_weights=perceptual_weights,
        )
        self.codebook_weight, self.n_classes = codebook_weight, n_classes
        self.pixel_loss = F.l1_loss if pixel_loss == "l1" else F.mse_loss

    def forward(
        self,
        codebook_loss: Tensor,
        inputs: Tensor,  # (B, C, H, W) in [-1, 1]
        reconstructions: Tensor,
        optimizer_idx: int,  # 0 generator, 1 discriminator
        global_step: int,
        last_layer: Tensor | None = None,
        cond: Tensor | None = None,
        split: str = "train",
        predicted_indices: Tensor | None = None,
    ) -> tuple[Tensor, Logs]:
        """Loss of one of the two players, and what to log, under `split`/."""
        if optimizer_idx == 1:
            loss, logs = self.discriminator_term(inputs, reconstructions, global_step, cond)
            return loss, tagged(split, logs)
        pixel = self.pixel_loss(reconstructions, inputs, reduction="none")
        rec_loss, p_loss = self.pixel_and_perceptual(inputs, reconstructions, pixel)
        nll_loss, quant_loss = rec_loss.mean(), codebook_loss.mean()
        adversarial, logs = self.generator_term(nll_loss, reconstructions, global_step, last_layer, cond)
        loss = nll_loss + adversarial + self.codebook_weight * quant_loss
        logs |= {"total_loss": loss, "quant_loss": quant_loss, "nll_loss": nll_loss, "rec_loss": nll_loss, "p_loss": p_loss.mean()}
        if predicted_indices is not None and self.n_classes is not None:
            perplexity, usage = measure_perplexity(predicted_indices, self.n_classes)
            logs |= {"perplexity": perplexity, "cluster_usage": usage.float()}
        return loss, tagged(split, logs)
