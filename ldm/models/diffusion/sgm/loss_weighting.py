"""Weights of the denoising loss |D(x; sigma) - x0|^2 by noise level (arXiv:2206.00364, Sec. 5). Pure: sigma -> weight, same shape."""

from __future__ import annotations

from torch import Tensor

__all__ = ["EDMWeighting", "EpsWeighting", "UnitWeighting", "VWeighting"]


class UnitWeighting:
    """1 everywhere: plain error of x0."""

    def __call__(self, sigma: Tensor) -> Tensor:
        """Ones."""
        return sigma.new_ones(sigma.shape)


class EDMWeighting:
    """1 / c_out^2 of EDMScaling, so that all levels weigh the same at the start."""

    def __init__(self, sigma_data: float = 0.5) -> None:
        self.sigma_data = sigma_data

    def __call__(self, sigma: Tensor) -> Tensor:
        """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


class VWeighting(EDMWeighting):
    """The plain error of v: EDM's for data of unit variance."""

    def __init__(self) -> None:
        super().__init__(sigma_data=1.0)


class EpsWeighting:
    """The plain error of eps."""

    def __call__(self, sigma: Tensor) -> Tensor:
        """1 / sigma^2."""
        return sigma**-2.0
