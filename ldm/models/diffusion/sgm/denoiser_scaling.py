"""Preconditioning of the network: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (arXiv:2206.00364, Eq. 7). Pure."""

from __future__ import annotations

from torch import Tensor

__all__ = ["EDMScaling", "EpsScaling", "Scaling", "VScaling", "VScalingWithEDMcNoise"]

Scaling = tuple[Tensor, Tensor, Tensor, Tensor]  # c_skip, c_out, c_in, c_noise, each of the shape of sigma


class EDMScaling:
    """EDM, Table 1, right column: inputs and targets of unit variance for data of standard deviation `sigma_data`."""

    def __init__(self, sigma_data: float = 0.5) -> None:
        self.sigma_data = sigma_data

    def __call__(self, sigma: Tensor) -> Scaling:
        """The four coefficients at noise levels `sigma`."""
        variance = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / variance, sigma * self.sigma_data / variance.sqrt(), 1 / variance.sqrt(), 0.25 * sigma.log()


class EpsScaling:
    """For a network that predicts eps from the variance-preserving sample x / sqrt(sigma^2 + 1)."""

    def __call__(self, sigma: Tensor) -> Scaling:
        """The four coefficients at noise levels `sigma`."""
        return sigma.new_ones(sigma.shape), -sigma, 1 / (sigma**2 + 1).sqrt(), sigma.clone()


class VScaling:
    """For a network that predicts v (arXiv:2202.00512) from the variance-preserving sample."""

    def __call__(self, sigma: Tensor) -> Scaling:
        """The four coefficients at noise levels `sigma`."""
        variance = sigma**2 + 1
        return 1 / variance, -sigma / variance.sqrt(), 1 / variance.sqrt(), sigma.clone()


class VScalingWithEDMcNoise(VScaling):
    """As VScaling, but the network is told log(sigma) / 4."""

    def __call__(self, sigma: Tensor) -> Scaling:
        """The four coefficients at noise levels `sigma`."""
        c_skip, c_out, c_in, _ = super().__call__(sigma)
        return c_skip, c_out, c_in, 0.25 * sigma.log()
