"""The Gaussian that a KL autoencoder's encoder describes, and closed forms for Gaussians. Pure torch.

Source: VAE (arXiv:1312.6114), appendix B for the KL divergence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_LOG_2PI = math.log(2.0 * math.pi)


class AbstractDistribution:
    """Something that can be drawn from and has a most likely value."""

    def sample(self) -> Tensor:
        """A draw."""
        raise NotImplementedError

    def mode(self) -> Tensor:
        """The most likely value."""
        raise NotImplementedError


class DiracDistribution(AbstractDistribution):
    """All mass on one value."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def sample(self) -> Tensor:
        """The value."""
        return self.value

    def mode(self) -> Tensor:
        """The value."""
        return self.value


class DiagonalGaussianDistribution(AbstractDistribution):
    """N(mean, diag(var)) from `parameters` (B, 2C, H, W): mean and log-variance stacked along the channels.

    The log-variance is clamped to [-30, 20]. `deterministic` makes the variance zero: samples equal the mean, kl and nll are 0.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        self.parameters, self.deterministic = parameters, deterministic
        self.mean, logvar = torch.chunk(parameters, 2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        if deterministic:
            self.var = self.std = torch.zeros_like(self.mean)
        else:
            self.std, self.var = torch.exp(0.5 * self.logvar), torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Reparameterised draw. The noise comes from the CPU stream, so a seed gives the same draw on every device."""
        noise = torch.randn(self.mean.shape, generator=generator)
        return self.mean + self.std * noise.to(self.mean)

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """KL(self || other) in nats, summed over all dims but the first: (B,). `other` defaults to the standard normal."""
        if self.deterministic:
            return torch.zeros(1, device=self.mean.device)
        if other is None:
            terms = self.mean.square() + self.var - 1.0 - self.logvar
        else:
            shift = (self.mean - other.mean).square() / other.var
            terms = shift + self.var / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.sum(dim=[1, 2, 3])

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """-log density of `sample` in nats, summed over `dims`."""
        if self.deterministic:
            return torch.zeros(1, device=self.mean.device)
        terms = _LOG_2PI + self.logvar + (sample - self.mean).square() / self.var
        return 0.5 * terms.sum(dim=list(dims))


def normal_kl(mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    """Elementwise KL(N1 || N2) in nats. Shapes broadcast; scalars may stand for tensors, but one argument must be a tensor."""
    tensor = next((a for a in (mean1, logvar1, mean2, logvar2) if isinstance(a, Tensor)), None)
    if tensor is None:
        raise TypeError("normal_kl needs at least one tensor among its four arguments")
    logvar1, logvar2 = (a if isinstance(a, Tensor) else torch.as_tensor(a).to(tensor) for a in (logvar1, logvar2))
    scaled_shift = (mean1 - mean2) ** 2 * torch.exp(-logvar2)
    return 0.5 * (-1.0 + logvar2 - logvar1 + torch.exp(logvar1 - logvar2) + scaled_shift)
