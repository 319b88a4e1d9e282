"""Public address: the latent distribution."""

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

__all__ = ["DiagonalGaussianDistribution"]
