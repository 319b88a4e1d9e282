"""The KL autoencoder as generative-models (SDXL) configs know it: `encode` gives a drawn latent, not a distribution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm.models import autoencoder
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

__all__ = ["AutoencoderKL", "AutoencoderKLInferenceWrapper", "IdentityFirstStage"]

IdentityFirstStage = autoencoder.IdentityFirstStage


class AutoencoderKL(autoencoder.AutoencoderKL):
    """Same weights and names as `ldm.models.autoencoder.AutoencoderKL`; only `encode` differs."""

    def posterior(self, x: Tensor) -> DiagonalGaussianDistribution:
        """The distribution from which `encode` draws."""
        return super().encode(x)

    def encode(self, x: Tensor, return_reg_log: bool = False) -> Any:
        """A draw (B, embed_dim, H/f, W/f); with `return_reg_log` also {"kl_loss": KL in nats, mean over the batch}."""
        posterior = self.posterior(x)
        z = posterior.sample()
        return (z, {"kl_loss": posterior.kl().mean()}) if return_reg_log else z

    def forward(self, input: Tensor, sample_posterior: bool = True) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Reconstruction of `input` from a draw (or the mode) of its posterior, and the posterior."""
        posterior = self.posterior(input)
        z = posterior.sample() if sample_posterior else posterior.mode()
        return self.decode(z), posterior


class AutoencoderKLInferenceWrapper(AutoencoderKL):
    """The name inference configs use."""

    @torch.no_grad()
    def encode(self, x: Tensor, return_reg_log: bool = False) -> Any:
        """As AutoencoderKL.encode, without gradients."""
        return super().encode(x, return_reg_log)
